"""Blocks of ControlNet-XS with diffusers' parameter names: levels between zero convolutions."""

import flax.linen as nn
import jax.numpy as jnp

from cnxs_jax.control.controlled_unet import zero_conv
from cnxs_jax.models.conv import Downsample, ResnetBlock, Upsample
from cnxs_jax.models.unet_blocks import Level, SpatialTransformer, rematerialised


def most_groups(channels, most):
    """The largest number of groups, `most` or fewer, that divides `channels`."""
    return next(n for n in range(min(most, channels), 0, -1) if channels % n == 0)


class ControlLevel(Level):
    """A level whose widths need not be divisible by anything, with its connections to the base.

    Args:
        num_groups: of the transformers' norms.
        resnet_groups: of both norms of each resnet.
        entries: channels of the zero convolutions from the base, one before each layer and the
            downsampler.
        exits: those to the base after each of them, or none.
        concatenates: the base's features are appended to the stream; else they are added.
    """

    head_dim: int = 1
    resnet_groups: tuple = ()
    attention_eps: float = 1e-6
    entries: tuple = ()
    exits: tuple = ()
    concatenates: bool = True

    def setup(self):
        resnet = rematerialised(ResnetBlock, self.remat)
        self.resnets = [
            resnet(self.features, groups, self.epsilon, self.dtype) for groups in self.resnet_groups
        ]
        if self.depth:
            self.attentions = [self._transformer() for _ in range(self.attended)]
        if self.resample == "down":
            self.downsamplers = Downsample(dtype=self.dtype, features=self.features)
        if self.resample == "up":
            self.upsamplers = [Upsample(self.dtype)]
        self.base_to_ctrl = [zero_conv(width, dtype=self.dtype) for width in self.entries]
        self.ctrl_to_base = [zero_conv(width, dtype=self.dtype) for width in self.exits]

    def _transformer(self):
        return SpatialTransformer(
            self.features,
            self.num_heads,
            self.head_dim,
            self.depth,
            self.num_groups,
            self.use_linear_projection,
            self.attention_eps,
            self.dtype,
            self.impl,
            self.remat,
        )

    def stage(self, j, c, h, temb_BxE, kv, mask_BxS=None, skip=None):
        """`c` joined with the base's `h` (and a skip), then layer `j`; after the last, down."""
        c = join(c, self.base_to_ctrl[j](h), self.concatenates)
        if skip is not None:
            c = jnp.concatenate([c, skip], axis=-1)
        if j == self.num_resnets:
            return self.downsamplers(c)
        return self.layer(j, c, temb_BxE, kv, mask_BxS)

    def to_base(self, j, c):
        """What layer `j` adds to the base."""
        return self.ctrl_to_base[j](c)


class ControlMiddle(nn.Module):
    """Resnet, transformer, resnet between two connections.

    Args:
        level: the fields of its `ControlLevel`.
        entry, exit: channels of the zero convolutions from the base and to it.
    """

    level: dict
    entry: int
    exit: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.midblock = ControlLevel(**self.level)
        self.base_to_ctrl = zero_conv(self.entry, dtype=self.dtype)
        self.ctrl_to_base = zero_conv(self.exit, dtype=self.dtype)

    def keys_values(self, text_BxSxD):
        """(keys, values) of every transformer block."""
        return self.midblock.keys_values(text_BxSxD)

    def __call__(self, c, h, temb_BxE, kv, mask_BxS=None):
        c = join(c, self.base_to_ctrl(h), self.level["concatenates"])
        c = self.midblock.layer(0, c, temb_BxE, kv, mask_BxS)
        return self.midblock.layer(1, c, temb_BxE, kv)

    def to_base(self, c):
        """What the middle adds to the base."""
        return self.ctrl_to_base(c)


class Connections(nn.Module):
    """The zero convolutions from the control encoder into one level of the base's decoder."""

    widths: tuple
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.ctrl_to_base = [zero_conv(width, dtype=self.dtype) for width in self.widths]

    def __call__(self, j, skip):
        return self.ctrl_to_base[j](skip)


def join(c, h, concatenates):
    """The control stream with the base's features appended or added."""
    return jnp.concatenate([c, h], axis=-1) if concatenates else c + h

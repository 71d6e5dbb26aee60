"""Blocks of Stable Diffusion's UNet, NHWC, with diffusers' parameter names.

Each level offers its layers one at a time, so that a controller can work between them. The text
enters as keys and values, which do not change over the sampling steps: `keys_values` makes them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnxs_jax.models.activations import gelu
from cnxs_jax.models.attention import attention
from cnxs_jax.models.conv import Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from cnxs_jax.models.layers import Attention, Dense
from cnxs_jax.models.painting import score_bias


def rematerialised(block, remat):
    """The block class, recomputed in the backward pass: None, "full" or a checkpoint policy."""
    if remat is None:
        return block
    policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
    return nn.remat(block, policy=policy)


def norm(dtype):
    """LayerNorm with PyTorch's epsilon, in float32 with two passes."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype)


class GEGLU(nn.Module):
    """Linear to twice the width; one half is gated by the exact GELU of the other."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = Dense(2 * self.features, dtype=self.dtype, name="proj")(x)
        h, gate = jnp.split(h, 2, axis=-1)
        return h * gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back (diffusers `FeedForward`, `geglu`)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(h)


class CrossAttention(nn.Module):
    """Attention to given keys and values, which `keys_values` makes of a context.

    `paint` moves the scores towards painted words, see `painting`.
    """

    num_heads: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32
    impl: str | None = None

    def setup(self):
        inner = self.num_heads * self.head_dim
        self.to_q = Dense(inner, use_bias=False, dtype=self.dtype)
        self.to_k = Dense(inner, use_bias=False, dtype=self.dtype)
        self.to_v = Dense(inner, use_bias=False, dtype=self.dtype)
        self.to_out_0 = Dense(inner, dtype=self.dtype)

    def keys_values(self, context_BxSxD):
        """([B,S,H,D], [B,S,H,D])."""
        return self._heads(self.to_k(context_BxSxD)), self._heads(self.to_v(context_BxSxD))

    def __call__(self, x_BxLxC, kv, mask_BxS=None, paint=None):
        q = self._heads(self.to_q(x_BxLxC))
        bias = None if paint is None else score_bias(paint, q, kv[0], mask_BxS)
        out = attention(q, *kv, mask_BxS=mask_BxS, bias=bias, impl=self.impl)
        return self.to_out_0(out.reshape(*x_BxLxC.shape[:2], -1))

    def _heads(self, h):
        return h.reshape(*h.shape[:2], self.num_heads, self.head_dim)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, GEGLU, each after a norm (`BasicTransformerBlock`)."""

    num_heads: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32
    impl: str | None = None

    def setup(self):
        sizes = self.num_heads, self.head_dim
        self.norm1, self.norm2, self.norm3 = (norm(self.dtype) for _ in range(3))
        self.attn1 = Attention(*sizes, use_bias=False, dtype=self.dtype, impl=self.impl)
        self.attn2 = CrossAttention(*sizes, self.dtype, self.impl)
        self.ff = FeedForward(self.dtype)

    def keys_values(self, text_BxSxD):
        """What `__call__` needs of the text."""
        return self.attn2.keys_values(text_BxSxD)

    def __call__(self, x_BxLxC, kv, mask_BxS=None, paint=None):
        x = x_BxLxC + self.attn1(self.norm1(x_BxLxC))
        x = x + self.attn2(self.norm2(x), kv, mask_BxS, paint)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of [B,H,W,features] (`Transformer2DModel`).

    Args:
        num_heads, head_dim: their product is the inner width, which need not be `features`.
        epsilon: of the group norm: 1e-6, where the resnets have 1e-5.
        use_linear_projection: linear layers instead of 1x1 convolutions around the blocks: the
            same numbers under another shape.
    """

    features: int
    num_heads: int
    head_dim: int
    num_layers: int = 1
    num_groups: int = 32
    use_linear_projection: bool = False
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    impl: str | None = None
    remat: str | None = None

    def setup(self):
        def project(width):
            if self.use_linear_projection:
                return Dense(width, dtype=self.dtype)
            return Conv(width, 1, dtype=self.dtype)

        block = rematerialised(TransformerBlock, self.remat)
        self.norm = GroupNorm(self.num_groups, self.epsilon, self.dtype)
        self.proj_in = project(self.num_heads * self.head_dim)
        self.transformer_blocks = [
            block(self.num_heads, self.head_dim, self.dtype, self.impl)
            for _ in range(self.num_layers)
        ]
        self.proj_out = project(self.features)

    def keys_values(self, text_BxSxD):
        """(keys, values) of every block."""
        return tuple(block.keys_values(text_BxSxD) for block in self.transformer_blocks)

    def __call__(self, x_BxHxWxC, kv, mask_BxS=None, paint=None):
        B, H, W, _ = x_BxHxWxC.shape
        h = self.proj_in(self.norm(x_BxHxWxC)).reshape(B, H * W, -1)
        for block, block_kv in zip(self.transformer_blocks, kv, strict=True):
            h = block(h, block_kv, mask_BxS, paint)
        return x_BxHxWxC + self.proj_out(h.reshape(B, H, W, -1))


class Level(nn.Module):
    """The resnets of one resolution, each followed by a transformer if `depth`, and a resampler.

    Args:
        depth: transformer blocks after each resnet; 0: no attention and no text.
        num_attentions: how many resnets have one; all unless given (the middle: one of two).
        resample: "down", "up" or None.
        epsilon: of the resnets' norms.
    """

    features: int
    num_resnets: int
    depth: int
    num_heads: int
    resample: str | None
    num_groups: int
    epsilon: float
    use_linear_projection: bool
    num_attentions: int | None = None
    dtype: jnp.dtype = jnp.float32
    impl: str | None = None
    remat: str | None = None

    def setup(self):
        resnet = rematerialised(ResnetBlock, self.remat)
        self.resnets = [
            resnet(self.features, self.num_groups, self.epsilon, self.dtype)
            for _ in range(self.num_resnets)
        ]
        if self.depth:
            self.attentions = [self._transformer() for _ in range(self.attended)]
        if self.resample == "down":
            self.downsamplers = [Downsample(dtype=self.dtype)]
        if self.resample == "up":
            self.upsamplers = [Upsample(self.dtype)]

    @property
    def attended(self):
        """Number of transformers."""
        all_of_them = self.num_resnets if self.num_attentions is None else self.num_attentions
        return all_of_them if self.depth else 0

    def _transformer(self):
        return SpatialTransformer(
            self.features,
            self.num_heads,
            self.features // self.num_heads,
            self.depth,
            self.num_groups,
            self.use_linear_projection,
            dtype=self.dtype,
            impl=self.impl,
            remat=self.remat,
        )

    def keys_values(self, text_BxSxD):
        """(keys, values) of every block of every transformer."""
        if not self.depth:
            return ()
        return tuple(transformer.keys_values(text_BxSxD) for transformer in self.attentions)

    def layer(self, j, h, temb_BxE, kv, mask_BxS=None, paint=None):
        """Resnet `j` and, where it has one, its transformer; `paint`: a `Paint` at this size."""
        h = self.resnets[j](h, temb_BxE)
        return self.attentions[j](h, kv[j], mask_BxS, paint) if j < self.attended else h

    def downsample(self, h):
        """To half the size, rounded up."""
        return self.downsamplers[0](h)

    def upsample(self, h, size=None):
        """To twice the size, or to `size`; as it is at the highest resolution."""
        return self.upsamplers[0](h, size) if self.resample == "up" else h

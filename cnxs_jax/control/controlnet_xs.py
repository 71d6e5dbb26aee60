"""ControlNet-XS (arXiv 2312.06573): a small network that exchanges features with its base.

The controller looks at the base's features before each of its stages and answers after it, within
the same evaluation. With zero convolutions Z between the streams h (base) and c (control):

    c_0 = conv_in(x) + embed(hint);      c_i = stage_i(join(c_{i-1}, Z(h_{i-1})))
    h_i = base_i(h_{i-1}) + Z(c_i) * scale                    (types B and C)

`join` is a concatenation or, with `infusion` "add", a sum. In the decoder, types A and B add
Z(c_skip) to the base's stream before each stage; type C has a control decoder, which exchanges
features as the encoders do (not after the last stage, of which nothing would be left to control).

The published weights are of type B with concatenation. Their two implementations differ, `compat`:

- "official": every norm has the largest number of groups that divides its channels, all
  resnets epsilon 1e-5; on SDXL the controller's transformers have 1e-5, too. The control scale
  counts as part of `time_embedding_mix`.
- "diffusers": what `UNetControlNetXSModel.from_unet` computes: epsilon 1e-6 in the resnets of the
  base and of the controller's middle, one number of groups in the middle, and per level no
  more groups than its first norm has. The mix is a constant.
- "diffusers_pretrained": the same model opened from its own files, without the last of these.

What a control scale s means where the time embedding is learned (`learn_time_embedding`: SD 2.1
14M and SDXL 48M of the published), which both networks receive and no connection carries. A scale
and "no control" are the same at 0 only where this says so:

    cond                    reference                                  mixed by             at 0
    control_scale s         "official": the network, and the script    (mix * s) ** 0.3     the base
                            for SDXL, set its `control_scale`
    control_scale s         both of "diffusers": `conditioning_scale`  mix ** 0.3           differs
    connection_scale s      the original script for SD, which sets     as at control_scale  differs
                            `scale_list` alone
    control_active 0        `no_control`; `apply_control=False`        0                    the base

Where it is shared, all four are the base at 0.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnxs_jax import tree
from cnxs_jax.control import controlled_unet
from cnxs_jax.control.controlled_unet import COMPAT, HintEmbedding, zero_conv
from cnxs_jax.control.xs_blocks import Connections, ControlLevel, ControlMiddle
from cnxs_jax.control.xs_sizes import (
    Plan,
    check_config,
    check_fit,
    check_sizes,
    heads_of,
    of_base,
)
from cnxs_jax.errors import ConfigError, did_you_mean
from cnxs_jax.models.conv import Conv
from cnxs_jax.models.layers import TimestepEmbedding
from cnxs_jax.models.unet import down_stages, up_stages


class ControlNetXS(nn.Module):
    """The adapter. `cnxs_jax.control.attach` puts it on a UNet, `from_unet` sizes it for one.

    Fields carry the names of diffusers' `ControlNetXSAdapter`, but for `control_type`, `infusion`,
    `attention_head_width`, `layers_per_block` and `in_channels`, which it does not have.

    Args:
        time_embedding_mix: with `learn_time_embedding`, `mix ** 0.3` of the time embedding for both
            networks is the adapter's and the rest the base's (diffusers' text says the reverse).
        attention_head_width: of a head, one for all levels or one each, where it is not
            `block_out_channels / num_attention_heads`.
        max_norm_num_groups: the most groups of a norm.
        upcast_attention: no effect, see `UNet`.
        attention_eps, compat: set by `attach`.
    """

    conditioning_channels: int = 3
    conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple = (16, 32, 96, 256)
    time_embedding_mix: float = 1.0
    learn_time_embedding: bool = False
    num_attention_heads: int | tuple = 4
    block_out_channels: tuple = (4, 8, 16, 16)
    base_block_out_channels: tuple = (320, 640, 1280, 1280)
    cross_attention_dim: int = 1024
    down_block_types: tuple = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    sample_size: int | tuple | None = 96
    transformer_layers_per_block: int | tuple = 1
    upcast_attention: bool | None = True
    max_norm_num_groups: int = 32
    use_linear_projection: bool = True
    control_type: str = "B"
    infusion: str = "cat"
    attention_head_width: int | tuple | None = None
    layers_per_block: int | tuple = 2
    in_channels: int = 4
    dtype: jnp.dtype = jnp.float32
    remat: str | None = None
    attention_impl: str | None = None
    attention_eps: float = 1e-6
    compat: str = "official"

    hint_kind = "image"

    def per_level(self, value):
        """A value that is one for all levels or one each, as one each."""
        levels = len(self.block_out_channels)
        return tuple(value) if isinstance(value, tuple | list) else (value,) * levels

    @property
    def hint_factor(self):
        """Pixels of the hint along a side of a latent pixel."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    @property
    def down_stages(self):
        """(level, layer) of encoder stages 1 and up, as the base counts them."""
        return down_stages(self.per_level(self.layers_per_block))

    @property
    def up_stages(self):
        """(level, layer) of the decoder stages."""
        return up_stages(self.per_level(self.layers_per_block))

    def setup(self):
        check_config(self)
        dtype, base = self.dtype, self.base_block_out_channels
        widths = self.conditioning_embedding_out_channels
        self.controlnet_cond_embedding = HintEmbedding(self.block_out_channels[0], widths, dtype)
        self.conv_in = Conv(self.block_out_channels[0], dtype=dtype)
        if self.learn_time_embedding:
            self.time_embedding = TimestepEmbedding(4 * base[0], dtype)
        if self.control_type != "A":
            self.control_to_base_for_conv_in = zero_conv(base[0], dtype=dtype)
        plan = Plan(self)
        self.down_blocks = [ControlLevel(**plan.down(i)) for i in range(len(base))]
        self.mid_block = ControlMiddle(plan.mid(), *plan.mid_connections(), dtype)
        if self.control_type == "C":
            self.up_blocks = [ControlLevel(**plan.up(i)) for i in range(len(base))]
        else:
            self.up_connections = [Connections(w, dtype) for w in plan.up_connections()]

    # What `ControlledUNet` calls

    def prepare(self, hint, cond):
        """The features of the hint and the text's keys and values: constant over the steps."""
        if self.conditioning_channel_order == "bgr":
            hint = hint[..., ::-1]
        text = cond["text"].astype(self.dtype)
        ready = {
            "hint": self.controlnet_cond_embedding(hint),
            "down": tuple(level.keys_values(text) for level in self.down_blocks),
            "mid": self.mid_block.keys_values(text),
        }
        if self.control_type == "C":
            ready["up"] = tuple(level.keys_values(text) for level in self.up_blocks)
        return ready

    def learned_time(self, features):
        """The adapter's own embedding of the base's time features, or None."""
        return self.time_embedding(features) if self.learn_time_embedding else None

    def embed(self, t, temb, ready):
        """Both networks take the same, mixed, embedding."""
        return temb

    def down(self, i, c, h, temb, ready, cond):
        """Stage `i`: the base's `h` before its stage joins the stream, then the layer."""
        if i == 0:
            return self.conv_in(c.astype(self.dtype)) + ready["hint"]
        level, j = self.down_stages[i - 1]
        block = self.down_blocks[level]
        return block.stage(j, c, h, temb, ready["down"][level], cond.get("text_mask"))

    def from_down(self, i, c):
        """Types B and C answer in the encoder; the skips are those of the corrected stream."""
        if self.control_type == "A":
            return None, None
        if i == 0:
            return self.control_to_base_for_conv_in(c), None
        level, j = self.down_stages[i - 1]
        return self.down_blocks[level].to_base(j, c), None

    def mid(self, c, h, temb, ready, cond):
        """The middle block."""
        return self.mid_block(c, h, temb, ready["mid"], cond.get("text_mask"))

    def from_mid(self, c):
        """The middle's answer."""
        return self.mid_block.to_base(c)

    def before_up(self, k, skips):
        """Types A and B: the encoder's features go straight to the base's decoder."""
        if self.control_type == "C":
            return None
        level, j = self.up_stages[k]
        return self.up_connections[level](j, skips[-1 - k])

    def up(self, k, c, h, skips, temb, ready, cond):
        """Type C: a stage of the control decoder."""
        if self.control_type != "C" or k + 1 == len(self.up_stages):
            return c
        level, j = self.up_stages[k]
        block = self.up_blocks[level]
        mask, skip = cond.get("text_mask"), skips[-1 - k]
        c = block.stage(j, c, h, temb, ready["up"][level], mask, skip)
        turn = self.up_stages[k + 1][0] != level
        return block.upsample(c, skips[-2 - k].shape[1:3]) if turn else c

    def after_up(self, k, c):
        """Type C: the control decoder's answer."""
        if self.control_type != "C" or k + 1 == len(self.up_stages):
            return None
        level, j = self.up_stages[k]
        return self.up_blocks[level].to_base(j, c)

    def __call__(self, x, hint, text):
        """Makes the parameters: the adapter on its own, beside a base whose features are zero.

        Args: x [B,H,W,in_channels], hint [B,f*H,f*W,3], text [B,L,cross_attention_dim].
        """
        base, zeros = self.base_block_out_channels, jnp.zeros
        widths = [base[0], *(base[i] for i, _ in self.down_stages)]
        cond = {"text": text}
        temb, ready = zeros((x.shape[0], 4 * base[0])), self.prepare(hint, cond)
        self.learned_time(zeros((x.shape[0], base[0])))
        c, h, skips = x, x, []
        for i, width in enumerate(widths):
            c = self.down(i, c, h, temb, ready, cond)
            h = zeros((*c.shape[:3], width))
            self.from_down(i, c)
            skips.append(c)
        c = self.mid(c, h, temb, ready, cond)
        self.from_mid(c)
        for k, (level, _) in enumerate(self.up_stages):
            self.before_up(k, skips)
            c = self.up(k, c, h, skips, temb, ready, cond)
            h = zeros((*c.shape[:3], base[::-1][level]))
            self.after_up(k, c)
        return c

    @staticmethod
    def wrap(base, adapters, compat="official"):
        """The controlled network of a UNet and one adapter or a tuple of them."""
        if compat not in COMPAT:
            what = f"unknown compat {compat!r}.{did_you_mean(compat, COMPAT)}"
            raise ConfigError(what, "control.attach", f"use one of {', '.join(COMPAT)}")
        sgm = compat == "official" and getattr(base, "addition_embed_type", None) is not None

        def fit(adapter):
            return adapter.clone(compat=compat, attention_eps=1e-5 if sgm else 1e-6)

        several = isinstance(adapters, tuple)
        adapters = tuple(map(fit, adapters)) if several else fit(adapters)
        module = controlled_unet.wrap(base, adapters, compat, check_fit)
        if compat == "official":
            return module
        return module.clone(base=base.clone(resnet_eps=1e-6))


def from_unet(base, size_ratio=None, block_out_channels=None, head_channels=None, **fields):
    """A `ControlNetXS` that fits `base`, sized by a ratio of its channels or by channels.

    Heads follow the published rule unless `num_attention_heads` is among `fields`. A base with as
    many heads at every level (SD 1.5) passes their number on, and a head has at least as many
    channels as there are heads. Else (SD 2.1, SDXL) a head has the largest number of channels that
    divides the level's and is at most `head_channels`, by default the base's own.

    Raises ConfigError unless exactly one of `size_ratio` and `block_out_channels` is given, and for
    sizes that are not positive.
    """
    check_sizes(base, size_ratio, block_out_channels, head_channels)
    if block_out_channels is None:
        first = max(1, int(base.block_out_channels[0] * size_ratio))
        steps = (width // base.block_out_channels[0] for width in base.block_out_channels)
        block_out_channels = tuple(first * step for step in steps)
    if "num_attention_heads" not in fields:
        fields |= heads_of(base, block_out_channels, head_channels)
    return ControlNetXS(block_out_channels=tuple(block_out_channels), **(of_base(base) | fields))


def fresh_params(adapter, key):
    """Fresh float32 parameters, initialised as the official code does.

    Nothing is copied from the base. All connections are zero, and so are the last layers of the
    resnets and transformers.
    """
    side = 2 ** (len(adapter.block_out_channels) - 1)
    f, text = adapter.hint_factor * side, jnp.zeros((1, 1, adapter.cross_attention_dim))
    x = jnp.zeros((1, side, side, adapter.in_channels))
    hint = jnp.zeros((1, f, f, adapter.conditioning_channels))
    params = jax.jit(adapter.init)(key, x, hint, text)["params"]
    last = (r".*resnets_\d+/conv2/kernel", r".*attentions_\d+/proj_out/kernel")
    return tree.map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if tree.matches(last, path) else leaf, params
    )

"""The UNet of Stable Diffusion (arXiv 2112.10752) and SDXL (arXiv 2307.01952), a denoiser.

Fields carry the names of diffusers' `UNet2DConditionModel` config, parameters its names
(docs/architecture.md). `__call__` is a loop over named stages, and a controller is the same loop
with something in between:

    temb = unet.embed(t, cond)
    skips = []
    for i in range(unet.num_stages):
        h = unet.down(i, h, temb, cond)             # stage 0 is conv_in
        skips.append(h)
    h = unet.mid(h, temb, cond)
    for k in range(unet.num_stages):
        h = unet.up(k, h, skips, temb, cond)        # takes skips[-1 - k]
    out = unet.head(h)

`cond` must have been through `prepare`, which computes what neither `x` nor `t` changes.
"""

import flax.linen as nn
import jax.numpy as jnp

from cnxs_jax.errors import ConfigError
from cnxs_jax.models.activations import silu
from cnxs_jax.models.conv import Conv, GroupNorm
from cnxs_jax.models.layers import TimestepEmbedding, sinusoid
from cnxs_jax.models.painting import paint_at
from cnxs_jax.models.unet_blocks import Level

DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID = "UNetMidBlock2DCrossAttn"


class UNet(nn.Module):
    """`apply({"params": p}, x [B,H,W,C], t [B], cond) -> [B,H,W,out_channels]` float32.

    Reads `text` [B,L,cross_attention_dim] and, if there, `text_mask` [B,L] (Stable Diffusion's
    pipelines attend to the padding, too, and give none). With `addition_embed_type` "text_time":
    `pooled` [B,P] and `time_ids` [B,N]. With `time_cond_proj_dim`: `guidance` [B], LCM's omega,
    the guidance scale minus one (arXiv 2310.04378). Painted words as `painting` describes. Any
    height and width: sizes that do not halve evenly are rounded up on the way down and met again
    on the way up.

    Args:
        sample_size: side of the latents that it was trained on, (height, width) or None for
            none; only for those who ask, see `latent_sides`.
        attention_head_dim: the number of heads, in spite of its name in diffusers; one for all
            levels or one each, highest resolution first.
        transformer_layers_per_block: transformer blocks after a resnet, one for all or one each.
        upcast_attention: no effect: logits and softmax are float32 in every compute dtype.
        remat: None, "full", or the name of a policy in `jax.checkpoint_policies`.
        attention_impl: a form of `cnxs_jax.models.attention`, chosen unless given.
        resnet_eps: of the resnets' norms where it is not `norm_eps` (a controller's choice).

    Raises ConfigError for a condition that is missing or has another width.
    """

    sample_size: int | tuple | None = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = MID
    up_block_types: tuple = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple = (320, 640, 1280, 1280)
    layers_per_block: int | tuple = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple = 1
    attention_head_dim: int | tuple = 8
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    time_cond_proj_dim: int | None = None
    dtype: jnp.dtype = jnp.float32
    remat: str | None = None
    attention_impl: str | None = None
    resnet_eps: float | None = None

    @property
    def num_levels(self):
        """Number of resolutions."""
        return len(self.block_out_channels)

    def per_level(self, value):
        """A config value that is one for all levels or one each, as one each."""
        return tuple(value) if isinstance(value, tuple | list) else (value,) * self.num_levels

    @property
    def down_stages(self):
        """(level, layer) of encoder stages 1 and up; the layer after the last one downsamples."""
        return down_stages(self.per_level(self.layers_per_block))

    @property
    def up_stages(self):
        """(level, layer) of the decoder stages, lowest resolution first."""
        return up_stages(self.per_level(self.layers_per_block))

    @property
    def num_stages(self):
        """Encoder stages with `conv_in`, and as many decoder stages: 12 in SD, 9 in SDXL."""
        return len(self.up_stages)

    @property
    def down_widths(self):
        """Channels that each encoder stage gives out."""
        widths = self.block_out_channels
        return (widths[0], *(widths[i] for i, _ in self.down_stages))

    @property
    def up_widths(self):
        """Channels that each decoder stage gives out."""
        return tuple(self.block_out_channels[::-1][i] for i, _ in self.up_stages)

    def setup(self):
        self._check()
        dtype, widths = self.dtype, self.block_out_channels
        depths, heads = self._depths(self.down_block_types, DOWN), self._heads()
        layers, last = self.per_level(self.layers_per_block), self.num_levels - 1
        self.conv_in = Conv(widths[0], dtype=dtype)
        self.time_embedding = TimestepEmbedding(4 * widths[0], dtype)
        if self.addition_embed_type:
            self.add_embedding = TimestepEmbedding(4 * widths[0], dtype)
        self.down_blocks = [
            self._level(widths[i], layers[i], depths[i], heads[i], "down" if i < last else None)
            for i in range(self.num_levels)
        ]
        if self.mid_block_type:
            depth = self.per_level(self.transformer_layers_per_block)[-1]
            self.mid_block = self._level(widths[-1], 2, depth, heads[-1], None, num_attentions=1)
        depths = self._depths(self.up_block_types[::-1], UP)
        self.up_blocks = [
            self._level(widths[i], layers[i] + 1, depths[i], heads[i], "up" if i else None)
            for i in reversed(range(self.num_levels))
        ]
        self.conv_norm_out = GroupNorm(self.norm_num_groups, self.norm_eps, jnp.float32)
        self.conv_out = Conv(self.out_channels, dtype=jnp.float32)

    def __call__(self, x, t, cond):
        cond = self.prepare(cond)
        temb = self.embed(t, cond)
        h, skips = x, []
        for i in range(self.num_stages):
            h = self.down(i, h, temb, cond)
            skips.append(h)
        h = self.mid(h, temb, cond)
        for k in range(self.num_stages):
            h = self.up(k, h, skips, temb, cond)
        return self.head(h)

    # Stages

    def prepare(self, cond):
        """Adds the text's keys and values and SDXL's embedding of `pooled` and `time_ids`."""
        if "prepared" in cond:
            return cond
        text = self._text(cond)
        up = tuple(level.keys_values(text) for level in self.up_blocks)
        return {**cond, "prepared": self.prepare_encoder(cond) | {"up": up}}

    def prepare_encoder(self, cond):
        """The part of `cond["prepared"]` that encoder and middle read."""
        text = self._text(cond)
        ready = {"down": tuple(level.keys_values(text) for level in self.down_blocks)}
        if self.mid_block_type:
            ready["mid"] = self.mid_block.keys_values(text)
        if self.addition_embed_type:
            ready["added"] = self.add_embedding(self._added(cond))
        return ready

    def embed(self, t, cond):
        """[B,4*C0]: what the resnets receive, `embed_time` with SDXL's addition."""
        return self.add_condition(self.embed_time(t, cond), cond)

    def embed_time(self, t, cond):
        """[B,4*C0]: the timestep's embedding alone, which a controller may mix with its own."""
        guidance = None
        if self.time_cond_proj_dim:
            omega = 1000.0 * read(cond, "guidance").astype(jnp.float32)
            dim = self.time_cond_proj_dim
            guidance = sinusoid(omega, dim, flip_sin_to_cos=False, downscale_freq_shift=1.0)
        return self.time_embedding(self.time_features(t), guidance)

    def time_features(self, t):
        """[B,C0] float32: the sinusoid that the time embedding starts from."""
        return sinusoid(t, self.block_out_channels[0])

    def add_condition(self, temb, cond):
        """SDXL: the embedding of `pooled` and `time_ids` added; else as it is."""
        return temb + cond["prepared"]["added"] if self.addition_embed_type else temb

    def down(self, i, h, temb, cond):
        """Encoder stage `i`: `conv_in`, then each layer and each downsampler."""
        if i == 0:
            return self.conv_in(h.astype(self.dtype))
        i, j = self.down_stages[i - 1]
        level = self.down_blocks[i]
        if j == level.num_resnets:
            return level.downsample(h)
        return level.layer(j, h, temb, cond["prepared"]["down"][i], *words(cond, h))

    def mid(self, h, temb, cond):
        """Resnet, transformer, resnet at the lowest resolution."""
        if not self.mid_block_type:
            return h
        kv = cond["prepared"]["mid"]
        h = self.mid_block.layer(0, h, temb, kv, *words(cond, h))
        return self.mid_block.layer(1, h, temb, kv)

    def up(self, k, h, skips, temb, cond):
        """Decoder stage `k`: takes `skips[-1 - k]`, the last layer of a level upsamples."""
        i, j = self.up_stages[k]
        level, skip = self.up_blocks[i], skips[-1 - k]
        h = jnp.concatenate([h, skip.astype(h.dtype)], axis=-1)
        h = level.layer(j, h, temb, cond["prepared"]["up"][i], *words(cond, h))
        if j + 1 < level.num_resnets or k + 1 == self.num_stages:
            return h
        return level.upsample(h, skips[-2 - k].shape[1:3])

    def head(self, h):
        """Norm, SiLU and convolution in float32 -> [B,H,W,out_channels]."""
        return self.conv_out(silu(self.conv_norm_out(h)))

    # Sizes

    def _heads(self):
        return self.per_level(self.attention_head_dim)

    def _depths(self, types, attended):
        """Transformer blocks a layer, 0 where the level has none; highest resolution first."""
        depths = self.per_level(self.transformer_layers_per_block)
        return [depth if attended[name] else 0 for depth, name in zip(depths, types, strict=True)]

    def _level(self, width, layers, depth, heads, resample, num_attentions=None):
        return Level(
            width,
            layers,
            depth,
            heads,
            resample,
            self.norm_num_groups,
            self.norm_eps if self.resnet_eps is None else self.resnet_eps,
            self.use_linear_projection,
            num_attentions,
            self.dtype,
            self.attention_impl,
            self.remat,
        )

    def _text(self, cond):
        return read(cond, "text", self.cross_attention_dim).astype(self.dtype)

    def _added(self, cond):
        """SDXL's micro-conditioning: pooled text and the sinusoids of the numbers, [B,E]."""
        pooled, ids = read(cond, "pooled"), read(cond, "time_ids")
        parts = sinusoid(ids.reshape(-1), self.addition_time_embed_dim)
        h = jnp.concatenate([pooled.astype(jnp.float32), parts.reshape(ids.shape[0], -1)], axis=-1)
        if h.shape[-1] != self.projection_class_embeddings_input_dim:
            raise ConfigError(
                f"pooled {list(pooled.shape)} and {ids.shape[1]} time_ids make {h.shape[-1]} "
                f"numbers, the model takes {self.projection_class_embeddings_input_dim}",
                'cond["pooled"], cond["time_ids"]',
            )
        return h

    def _check(self):
        n, where = self.num_levels, "unet config"
        latent_sides(self.sample_size, where)
        for name in ("down_block_types", "up_block_types"):
            known, given = DOWN if name.startswith("down") else UP, getattr(self, name)
            if len(given) != n or not set(given) <= set(known):
                raise ConfigError(f"{name} = {given}, expected {n} of {sorted(known)}", where)
        for name in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
            given = self.per_level(getattr(self, name))
            if len(given) != n or not all(type(v) is int and v > 0 for v in given):
                raise ConfigError(f"{name} = {given}, expected {n} positive numbers", where)
        for width, heads in zip(self.block_out_channels, self._heads(), strict=True):
            if width % self.norm_num_groups or width % heads:
                raise ConfigError(
                    f"{width} channels are not divisible by {self.norm_num_groups} groups and "
                    f"{heads} heads",
                    where,
                )
        if self.mid_block_type not in (None, MID):
            raise ConfigError(f"mid_block_type = {self.mid_block_type!r}, only {MID}", where)
        sizes = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if self.addition_embed_type not in (None, "text_time"):
            kind = self.addition_embed_type
            raise ConfigError(f'addition_embed_type = {kind!r}, only "text_time"', where)
        if self.addition_embed_type and not all(sizes):
            raise ConfigError(
                'addition_embed_type "text_time" needs addition_time_embed_dim and '
                "projection_class_embeddings_input_dim",
                where,
            )


def words(cond, h):
    """(attention mask of the text, `Paint` at the size of `h` [B,H,W,C]); each may be None."""
    return cond.get("text_mask"), paint_at(cond, h.shape[1:3], cond["text"].shape[1])


def latent_sides(sample_size, where="sample_size"):
    """(height, width) of the latents that a config names: by one number, by two, or None by None.

    Raises ConfigError for anything else.
    """
    if sample_size is None:
        return None
    sides = sample_size if isinstance(sample_size, tuple | list) else (sample_size,) * 2
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        what = f"sample_size = {sample_size!r}, expected a number of latents or (height, width)"
        raise ConfigError(what, where)
    return tuple(sides)


def down_stages(layers):
    """(level, layer) of encoder stages 1 and up; the layer after a level's last downsamples."""
    last = len(layers) - 1
    counts = [n + (i < last) for i, n in enumerate(layers)]
    return tuple((i, j) for i, n in enumerate(counts) for j in range(n))


def up_stages(layers):
    """(level, layer) of the decoder stages, lowest resolution first."""
    return tuple((i, j) for i, n in enumerate(layers[::-1]) for j in range(n + 1))


def read(cond, key, width=None):
    """`cond[key]`, of the given last axis. Raises ConfigError."""
    value = cond.get(key)
    if value is None:
        raise ConfigError(f"this UNet reads `{key}`", "cond", f"it has {', '.join(sorted(cond))}")
    if width is not None and (value.ndim != 3 or value.shape[-1] != width):
        got = list(value.shape)
        raise ConfigError(f"expected [B,L,{width}], got {got}", f'cond["{key}"]')
    return value

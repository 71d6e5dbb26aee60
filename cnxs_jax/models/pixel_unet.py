"""The pixel-space UNets of eDiff-I (arXiv 2211.01324), as raw networks of the EDM form.

One module is both the base model (an ADM UNet, arXiv 2105.05233, with cross-attention behind each
self-attention) and, with `efficient=True`, a super-resolution stage (Efficient-UNet, arXiv
2205.11487, appendix B: each level first halves the resolution, so that few channels see the full
picture). eDiff-I's code was never released: what the paper leaves open is a field here.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnxs_jax.errors import ConfigError
from cnxs_jax.models.activations import silu
from cnxs_jax.models.conv import Conv, Downsample, GroupNorm, Upsample
from cnxs_jax.models.layers import Attention, Dense, TimestepEmbedding, layer_norm, sinusoid
from cnxs_jax.models.painting import paint_at

ZEROS = nn.initializers.zeros


class ScaleShiftBlock(nn.Module):
    """Resnet block whose second norm is scaled and shifted by the time embedding (ADM)."""

    features: int
    num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, emb_BxE):
        h = silu(GroupNorm(self.num_groups, 1e-5, self.dtype, name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        project = Dense(2 * self.features, dtype=self.dtype, name="time_emb_proj")
        scale, shift = jnp.split(project(silu(emb_BxE))[:, None, None], 2, axis=-1)
        h = GroupNorm(self.num_groups, 1e-5, self.dtype, name="norm2")(h) * (1 + scale) + shift
        # The block starts as its shortcut.
        h = Conv(self.features, dtype=self.dtype, kernel_init=ZEROS, name="conv2")(silu(h))
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, then cross-attention to the context; either may be off."""

    head_dim: int
    num_groups: int
    self_attention: bool
    cross_attention: bool
    dtype: jnp.dtype
    impl: str | None

    @nn.compact
    def __call__(self, x, context_BxSxD, mask_BxS, cond):
        B, H, W, C = x.shape
        heads = max(C // self.head_dim, 1)

        def attend(name, *args, **kwargs):
            layer = Attention(
                *(heads, C // heads), dtype=self.dtype, impl=self.impl, out_init=ZEROS, name=name
            )
            return layer(*args, **kwargs)

        if self.self_attention:
            h = GroupNorm(self.num_groups, 1e-5, self.dtype, name="norm1")(x)
            x = x + attend("attn1", h.reshape(B, H * W, C)).reshape(x.shape)
        if self.cross_attention:
            h = GroupNorm(self.num_groups, 1e-5, self.dtype, name="norm2")(x)
            paint = paint_at(cond, (H, W), context_BxSxD.shape[1])
            h = attend("attn2", h.reshape(B, H * W, C), context_BxSxD, mask_BxS, paint=paint)
            x = x + h.reshape(x.shape)
        return x


class Context(nn.Module):
    """The encoders' outputs as one sequence: T5, CLIP text, CLIP image, then the null tokens.

    What is masked is zero before its projection and has no weight after it, so it cannot matter,
    not even as NaN; null tokens are always there to attend to. An encoder that `cond` lacks
    contributes no tokens.
    """

    features: int
    encoder_dims: tuple  # (name, channels) in order
    num_null_tokens: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, cond, batch):
        tokens, masks = [], []
        for name, channels in self.encoder_dims:
            value, mask = encoder_input(cond, name, channels, batch, self.is_initializing())
            if value is None:
                continue
            h = Dense(self.features, dtype=self.dtype, name=f"{name}_proj")(value)
            tokens.append(layer_norm(h))  # encoders differ in scale by orders of magnitude
            masks.append(mask)
        shape = (self.num_null_tokens, self.features)
        null = self.param("null_tokens", nn.initializers.normal(1.0), shape)
        tokens.append(jnp.broadcast_to(null.astype(self.dtype)[None], (batch, *shape)))
        masks.append(jnp.ones((batch, self.num_null_tokens), jnp.float32))
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)


def encoder_input(cond, name, channels, batch, initializing):
    """`(values [B,L,channels], mask [B,L])` of an encoder with zeros under the mask, or Nones.

    A vector [B,channels] with mask [B] is one token. Without a mask everything is real.
    """
    if name not in cond:
        if not initializing:
            return None, None
        return jnp.zeros((batch, 1, channels)), jnp.zeros((batch, 1))
    value, mask = cond[name], cond.get(f"{name}_mask")
    if value.shape[-1] != channels:
        raise ConfigError(
            f"{value.shape[-1]} channels, but the network takes {channels}", f'cond["{name}"]'
        )
    mask = jnp.ones(value.shape[:-1]) if mask is None else mask
    value = jnp.where(mask[..., None] > 0, value, 0)
    if value.ndim == 2:
        value, mask = value[:, None], mask[:, None]
    return value, (mask > 0).astype(jnp.float32)


class PixelUNet(nn.Module):
    """`apply({"params": p}, c_in x [B,H,W,C], c_noise [B], cond) -> F [B,H,W,out_channels]`.

    The EDM form around it is `diffusion.edm.precondition`. Reads, each as far as it is there:
    `text` [B,L,text_dim], `clip_text` [B,M,clip_text_dim], `clip_image` [B,clip_image_dim] with
    `text_mask` [B,L], `clip_text_mask` [B,M], `clip_image_mask` [B] (zeros: dropped); `pooled`
    [B,pooled_dim], the pooled CLIP text, which is dropped with `clip_text_mask`; `low_res`
    [B,h,w,low_res_channels] in [-1, 1] and `low_res_noise` [B], the noise level in it (0 unless
    given); painted words as `models.painting` describes, over the context's order `text`,
    `clip_text`, `clip_image`.

    Args:
        block_out_channels, layers_per_block, self_attention, cross_attention: one entry a level,
            the finest first; the middle block attends like the coarsest level.
        efficient: halve the resolution at the start of each level instead of between levels, and
            scale the skips by 1/sqrt(2).
        attention_head_dim: channels a head.
        cross_attention_dim: width of the context.
        num_null_tokens: learnable tokens that are always there; 3 is one for each encoder.
        clip_image_as: "token" of the context, or added to the "time" embedding.
        low_res_channels: None for the base model.
        time_scale: factor on c_noise and on low_res_noise before the sinusoid.

    Raises:
        ConfigError: fields of different lengths, a picture that the levels cannot halve, an input
            of the wrong width, or a super-resolution stage without `low_res`.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple = (256, 512, 1024, 1024)
    layers_per_block: tuple = (3, 3, 3, 3)
    self_attention: tuple = (False, True, True, True)
    cross_attention: tuple = (False, True, True, True)
    efficient: bool = False
    attention_head_dim: int = 64
    cross_attention_dim: int = 1024
    text_dim: int = 4096
    clip_text_dim: int = 768
    clip_image_dim: int = 768
    pooled_dim: int = 768
    num_null_tokens: int = 1
    clip_image_as: str = "token"
    low_res_channels: int | None = None
    norm_num_groups: int = 32
    time_scale: float = 1000.0
    dtype: jnp.dtype = jnp.float32
    attention_impl: str | None = None

    @nn.compact
    def __call__(self, x, t, cond):
        self.check(x, cond)
        emb = self.embedding(x.shape[0], t, cond)
        encoders = [("text", self.text_dim), ("clip_text", self.clip_text_dim)]
        if self.clip_image_as == "token":
            encoders.append(("clip_image", self.clip_image_dim))
        context = Context(
            self.cross_attention_dim, tuple(encoders), self.num_null_tokens, self.dtype
        )
        self_cross = (*context.copy(name="context")(cond, x.shape[0]), cond)
        h = x.astype(self.dtype)
        if self.low_res_channels:
            low = jax.image.resize(
                cond["low_res"].astype(self.dtype), (*x.shape[:3], self.low_res_channels), "linear"
            )
            h = jnp.concatenate([h, low], axis=-1)
        h = Conv(self.block_out_channels[0], dtype=self.dtype, name="conv_in")(h)
        h = self.levels(h, emb, self_cross)
        h = GroupNorm(self.norm_num_groups, 1e-5, jnp.float32, name="conv_norm_out")(h)
        return Conv(self.out_channels, kernel_init=ZEROS, name="conv_out")(silu(h))

    def levels(self, h, emb, context):
        """Down, middle and up; each block of the way up reads the skip of its twin."""
        last, skips, first = len(self.block_out_channels) - 1, [], h
        scale = math.sqrt(0.5) if self.efficient else 1.0
        for i, layers in enumerate(self.layers_per_block):
            if self.efficient:
                h = Downsample(dtype=self.dtype, name=f"down_blocks_{i}_downsampler")(h)
            for j in range(layers):
                h = self.block(f"down_blocks_{i}", i, j, h, emb, context)
                skips.append(h)
            if not self.efficient and i < last:
                h = Downsample(dtype=self.dtype, name=f"down_blocks_{i}_downsampler")(h)
        h = self.block("mid_block", last, 0, h, emb, context)
        h = self.resnet(last, "mid_block_resnets_1")(h, emb)
        for i in reversed(range(last + 1)):
            for j in range(self.layers_per_block[i]):
                h = jnp.concatenate([h, scale * skips.pop()], axis=-1)
                h = self.block(f"up_blocks_{i}", i, j, h, emb, context)
            if self.efficient or i > 0:
                h = Upsample(dtype=self.dtype, name=f"up_blocks_{i}_upsampler")(h)
        return jnp.concatenate([h, scale * first], axis=-1) if self.efficient else h

    def block(self, name, level, j, h, emb, context):
        """A resnet block and, where its level has it, attention."""
        h = self.resnet(level, f"{name}_resnets_{j}")(h, emb)
        own, cross = self.self_attention[level], self.cross_attention[level]
        if own or cross:
            h = self.attention(own, cross, f"{name}_attentions_{j}")(h, *context)
        return h

    def resnet(self, level, name):
        features = self.block_out_channels[level]
        return ScaleShiftBlock(features, self.norm_num_groups, self.dtype, name=name)

    def attention(self, own, cross, name):
        return AttentionBlock(
            *(self.attention_head_dim, self.norm_num_groups, own, cross),
            *(self.dtype, self.attention_impl),
            name=name,
        )

    def embedding(self, batch, t, cond):
        """Time, augmentation level, pooled CLIP text and perhaps CLIP image -> [B,E]."""
        width = self.block_out_channels[0]

        def embed(name, value):
            table = sinusoid(self.time_scale * value.astype(jnp.float32), width)
            return TimestepEmbedding(4 * width, self.dtype, name=name)(table)

        emb = embed("time_embedding", t)
        if self.low_res_channels:
            emb = emb + embed("low_res_embedding", cond.get("low_res_noise", jnp.zeros(batch)))
        vectors = [("pooled", self.pooled_dim, pooled_mask(cond))]
        if self.clip_image_as == "time":
            vectors.append(("clip_image", self.clip_image_dim, cond.get("clip_image_mask")))
        for name, channels, mask in vectors:
            own = {name: cond[name], f"{name}_mask": mask} if name in cond else {}
            value, mask = encoder_input(own, name, channels, batch, self.is_initializing())
            if value is not None:
                project = Dense(4 * width, dtype=self.dtype, name=f"{name}_embedding")
                emb = emb + project(value[:, 0]) * mask.astype(self.dtype)
        return emb

    def check(self, x, cond):
        """Raises ConfigError; see the class."""
        per_level = (self.layers_per_block, self.self_attention, self.cross_attention)
        levels = len(self.block_out_channels)
        if any(len(field) != levels for field in per_level):
            raise ConfigError("fields of different lengths", "PixelUNet", f"give {levels} levels")
        if self.clip_image_as not in ("token", "time"):
            raise ConfigError(f"unknown {self.clip_image_as!r}", "clip_image_as", "token or time")
        factor = 2 ** (levels if self.efficient else levels - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ConfigError(
                f"{x.shape[1]}x{x.shape[2]} is not divisible by {factor}", "height, width"
            )
        if self.low_res_channels and "low_res" not in cond:
            raise ConfigError("a super-resolution stage needs a picture", 'cond["low_res"]')


def pooled_mask(cond):
    """Whether the pooled CLIP text counts, [B]: where any of its tokens does; None if unknown."""
    mask = cond.get("clip_text_mask")
    return None if mask is None else (mask > 0).any(axis=1)

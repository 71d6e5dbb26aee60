"""The convolutional autoencoder of latent diffusion (arXiv 2112.10752), diffusers' `AutoencoderKL`.

Images [B,H,W,3] in [-1, 1] <-> latents [B,H/f,W/f,C], unscaled: pipelines multiply by
`scaling_factor`. Fields carry the names of diffusers' config, parameters its names
(docs/architecture.md).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnxs_jax.errors import ConfigError
from cnxs_jax.models.activations import silu
from cnxs_jax.models.attention import attention
from cnxs_jax.models.conv import HALF3, Conv, Downsample, GroupNorm, ResnetBlock, Upsample

BLOCKED_FROM = 512  # tokens; one head of many channels fits no fused kernel, so bound the logits
LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers clips it before the exponential


class AttentionBlock(nn.Module):
    """GroupNorm and one-head self-attention over the pixels, with a residual."""

    num_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape

        def dense(name, h):
            return nn.Dense(C, dtype=self.dtype, name=name)(h)

        h = GroupNorm(self.num_groups, dtype=self.dtype, name="group_norm")(x)
        h = h.reshape(B, H * W, C)
        q, k, v = (dense(name, h)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        h = attention(q, k, v, impl="blocked" if H * W >= BLOCKED_FROM else "xla")
        return x + dense("to_out_0", h[:, :, 0]).reshape(x.shape)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    features: int
    num_groups: int
    add_attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        def resnet(i, h):
            block = ResnetBlock(
                self.features, self.num_groups, dtype=self.dtype, name=f"resnets_{i}"
            )
            return block(h)

        x = resnet(0, x)
        if self.add_attention:
            x = AttentionBlock(self.num_groups, self.dtype, name="attentions_0")(x)
        return resnet(1, x)


class Stage(nn.Module):
    """Resnets at one resolution and, unless it is the last, the way to the next one."""

    features: int
    num_layers: int
    num_groups: int
    resample: str | None  # "down", "up" or None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        for i in range(self.num_layers):
            block = ResnetBlock(
                self.features, self.num_groups, dtype=self.dtype, name=f"resnets_{i}"
            )
            x = block(x)
        if self.resample == "down":
            return Downsample(HALF3, self.dtype, name="downsamplers_0")(x)
        if self.resample == "up":
            return Upsample(self.dtype, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    """Images -> moments of the latents before `quant_conv`."""

    block_out_channels: tuple
    layers_per_block: int
    out_channels: int
    num_groups: int
    add_attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        widths, groups, dtype = self.block_out_channels, self.num_groups, self.dtype
        x = Conv(widths[0], dtype=dtype, name="conv_in")(x)
        for i, width in enumerate(widths):
            resample = "down" if i + 1 < len(widths) else None
            stage = Stage(
                width, self.layers_per_block, groups, resample, dtype, name=f"down_blocks_{i}"
            )
            x = stage(x)
        x = MidBlock(widths[-1], groups, self.add_attention, dtype, name="mid_block")(x)
        x = silu(GroupNorm(groups, dtype=dtype, name="conv_norm_out")(x))
        return Conv(self.out_channels, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents after `post_quant_conv` -> images."""

    block_out_channels: tuple
    layers_per_block: int
    out_channels: int
    num_groups: int
    add_attention: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        widths, groups, dtype = self.block_out_channels[::-1], self.num_groups, self.dtype
        x = Conv(widths[0], dtype=dtype, name="conv_in")(x)
        x = MidBlock(widths[0], groups, self.add_attention, dtype, name="mid_block")(x)
        for i, width in enumerate(widths):
            resample = "up" if i + 1 < len(widths) else None
            stage = Stage(
                width, self.layers_per_block + 1, groups, resample, dtype, name=f"up_blocks_{i}"
            )
            x = stage(x)
        x = silu(GroupNorm(groups, dtype=dtype, name="conv_norm_out")(x))
        return Conv(self.out_channels, dtype=dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Image autoencoder with a diagonal Gaussian posterior.

    `apply({"params": p}, images, method="encode") -> (mean, logvar)`, each [B,h,w,C] float32;
    `apply({"params": p}, latents, method="decode") -> [B,f*h,f*w,out_channels]` float32, in
    [-1, 1] up to the network's error (not clipped). Compute dtype float32 or bfloat16: the
    published weights overflow float16 (ConfigError).

    Args:
        block_out_channels: channels of each resolution, highest resolution first.
        layers_per_block: resnets a resolution in the encoder; the decoder has one more.
        scaling_factor, shift_factor: the diffusion model sees
            `(latent - (shift_factor or 0)) * scaling_factor`; not applied here.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    act_fn: str = "silu"
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: jnp.dtype = jnp.float32

    @property
    def downsample_factor(self):
        """f: pixels a latent in height and width."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self):
        self._check()
        sizes = tuple(self.block_out_channels), self.layers_per_block
        rest = self.norm_num_groups, self.mid_block_add_attention, self.dtype
        self.encoder = Encoder(*sizes, 2 * self.latent_channels, *rest)
        self.decoder = Decoder(*sizes, self.out_channels, *rest)
        if self.use_quant_conv:
            self.quant_conv = Conv(2 * self.latent_channels, 1, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(self.latent_channels, 1, dtype=self.dtype)

    def __call__(self, images, key=None):
        """(reconstruction, mean, logvar); from a sample of the posterior if `key` is given."""
        mean, logvar = self.encode(images)
        z = mean
        if key is not None:
            z = z + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        return self.decode(z), mean, logvar

    def encode(self, images):
        """Images [B,H,W,in_channels] in [-1, 1] -> (mean, logvar) [B,h,w,latent_channels]."""
        self._check_channels(images, self.in_channels, "images")
        moments = self.encoder(images)
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents):
        """Unscaled latents [B,h,w,latent_channels] -> images [B,f*h,f*w,out_channels]."""
        self._check_channels(latents, self.latent_channels, "latents")
        h = self.post_quant_conv(latents) if self.use_post_quant_conv else latents
        return self.decoder(h).astype(jnp.float32)

    def _check(self):
        if jnp.dtype(self.dtype) == jnp.float16:
            raise ConfigError(
                "the VAE overflows in float16", "vae dtype", "use float32 or bfloat16"
            )
        if self.act_fn not in ("silu", "swish"):
            raise ConfigError(
                f"act_fn {self.act_fn!r} is not supported", "vae config", 'use "silu"'
            )
        bad = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if bad:
            raise ConfigError(
                f"block_out_channels {bad} are not divisible by norm_num_groups "
                f"{self.norm_num_groups}",
                "vae config",
            )

    def _check_channels(self, x, channels, where):
        if x.ndim != 4 or x.shape[-1] != channels:
            raise ConfigError(f"expected [B,H,W,{channels}], got {list(x.shape)}", where)

"""The PixArt-alpha diffusion transformer (arXiv 2310.00426), a denoiser.

Fields carry the names of diffusers' `PixArtTransformer2DModel` config, parameters its names
(docs/architecture.md). The blocks are scanned: their parameters have a leading layer axis.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnxs_jax import backend
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.activations import gelu_tanh, silu
from cnxs_jax.models.attention import sincos_2d
from cnxs_jax.models.layers import (
    Attention,
    Dense,
    FeedForward,
    TimestepEmbedding,
    layer_norm,
    sinusoid,
)
from cnxs_jax.models.painting import paint_at


class SizeEmbedding(nn.Module):
    """Timestep and, for the 1024-MS models, resolution and aspect ratio -> [B, D]."""

    features: int
    use_additional_conditions: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t, size=None, aspect=None):
        emb = TimestepEmbedding(self.features, self.dtype, name="timestep_embedder")(
            sinusoid(t, 256)
        )
        if not self.use_additional_conditions:
            return emb
        third = self.features // 3
        resolution = TimestepEmbedding(third, self.dtype, name="resolution_embedder")(
            sinusoid(size.reshape(-1), 256)
        )
        ratio = TimestepEmbedding(third, self.dtype, name="aspect_ratio_embedder")(
            sinusoid(aspect.reshape(-1), 256)
        )
        batch = t.shape[0]
        return emb + jnp.concatenate([resolution.reshape(batch, -1), ratio], axis=-1)


class AdaLayerNormSingle(nn.Module):
    """adaLN-single: one projection of the timestep for all blocks (PixArt-alpha, section 2.3)."""

    features: int
    use_additional_conditions: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t, size=None, aspect=None):
        embed = SizeEmbedding(self.features, self.use_additional_conditions, self.dtype, name="emb")
        emb = embed(t, size, aspect)
        return Dense(6 * self.features, dtype=self.dtype, name="linear")(silu(emb)), emb


class CaptionProjection(nn.Module):
    """Linear, GELU(tanh), Linear on the T5 tokens."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, text):
        h = Dense(self.features, dtype=self.dtype, name="linear_1")(text.astype(self.dtype))
        return Dense(self.features, dtype=self.dtype, name="linear_2")(gelu_tanh(h))


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention (no norm, no gate) and MLP, modulated by adaLN-single."""

    num_heads: int
    head_dim: int
    dtype: jnp.dtype = jnp.float32
    impl: str | None = None

    @nn.compact
    def __call__(self, x_BxNxD, text_kv, t0_Bx6xD, context_BxSxD, mask_BxS, paint=None):
        D = self.num_heads * self.head_dim
        table = self.param("scale_shift_table", nn.initializers.normal(D**-0.5), (6, D))
        modulation = (table[None] + t0_Bx6xD.astype(jnp.float32)).astype(self.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=1)

        def attend(name, *args, **kwargs):
            layer = Attention(
                self.num_heads, self.head_dim, dtype=self.dtype, impl=self.impl, name=name
            )
            return layer(*args, **kwargs)

        h = layer_norm(x_BxNxD) * (1 + scale1) + shift1
        x = x_BxNxD + gate1 * attend("attn1", h)
        x = x + attend("attn2", x, context_BxSxD, mask_BxS=mask_BxS, kv=text_kv, paint=paint)
        h = layer_norm(x) * (1 + scale2) + shift2
        x = x + gate2 * FeedForward(4 * D, self.dtype, name="ff")(h)
        self.sow("intermediates", "tokens", x)  # kept only where a caller asks for them
        return x, None


class PixArt(nn.Module):
    """PixArt-alpha: `apply({"params": p}, x [B,H,W,C], t [B], cond) -> [B,H,W,out_channels]`.

    Reads `text` [B,L,caption_channels], `text_mask` [B,L] and, with micro-conditioning, `size`
    [B,2] (height, width in pixels) and `aspect` [B,1]; painted words as `painting` describes. The
    first `in_channels` outputs are the prediction, the rest PixArt's learned variance range.

    Args:
        sample_size: side of the latents that it was trained on; sets the position table's scale.
        interpolation_scale: max(sample_size // 64, 1) unless given.
        use_additional_conditions: micro-conditioning; True at sample_size 128 unless given.
        remat: None, "full", or the name of a policy in `jax.checkpoint_policies`.
        attention_impl: a form of `cnxs_jax.models.attention`, chosen unless given.
    """

    num_layers: int = 28
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2
    sample_size: int = 128
    cross_attention_dim: int = 1152
    caption_channels: int = 4096
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    dtype: jnp.dtype = jnp.float32
    remat: str | None = None
    attention_impl: str | None = None

    @property
    def features(self):
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def micro_conditioning(self):
        """Whether `size` and `aspect` are read."""
        given = self.use_additional_conditions
        return self.sample_size == 128 if given is None else given

    def setup(self):
        D, dtype = self.features, self.dtype
        if self.cross_attention_dim != D:
            raise ConfigError(
                f"cross_attention_dim {self.cross_attention_dim} must equal "
                f"num_attention_heads * attention_head_dim = {D}",
                "transformer config",
            )
        self.pos_embed = PatchEmbed(D, self.patch_size, dtype)
        self.adaln_single = AdaLayerNormSingle(D, self.micro_conditioning, dtype)
        self.caption_projection = CaptionProjection(D, dtype)
        self.transformer_blocks = scanned_blocks(self.num_layers, self.remat, D)(
            self.num_attention_heads, self.attention_head_dim, dtype, self.attention_impl
        )
        self.scale_shift_table = self.param(
            "scale_shift_table", nn.initializers.normal(D**-0.5), (2, D)
        )
        self.proj_out = Dense(
            self.patch_size**2 * self.out_channels,
            dtype=jnp.float32,
            kernel_init=nn.initializers.zeros,
        )

    def __call__(self, x, t, cond):
        h, emb, t0 = self.embed(x, t, cond)
        text = self.prepare(cond)["prepared"]
        p = self.patch_size
        paint = paint_at(cond, (x.shape[1] // p, x.shape[2] // p), text["context"].shape[1])
        h, _ = self.transformer_blocks(
            h, text["kv"], t0, text["context"], cond.get("text_mask"), paint
        )
        return self.final(h, emb, x.shape[1:3])

    def embed(self, x, t, cond):
        """Tokens [B,N,D], time embedding [B,D] and adaLN-single modulation [B,6,D]."""
        p = self.patch_size
        if x.shape[1] % p or x.shape[2] % p:
            raise ConfigError(
                f"latents of {x.shape[1]}x{x.shape[2]} are not divisible by the patch size {p}",
                "height, width",
            )
        t0, emb = self.adaln_single(t, cond.get("size"), cond.get("aspect"))
        return self.tokens(x), emb, t0.reshape(t0.shape[0], 6, self.features)

    def tokens(self, x):
        """Patches of `x` [B,H,W,C] with their positions -> [B,N,D]; a control image's, too."""
        p = self.patch_size
        h = self.pos_embed(x.astype(self.dtype))
        table = sincos_2d(
            self.features,
            x.shape[1] // p,
            x.shape[2] // p,
            self.sample_size // p,
            self.interpolation_scale or max(self.sample_size // 64, 1),
        )
        return h + jnp.asarray(table, self.dtype)[None]

    def final(self, h_BxNxD, emb_BxD, size):
        """Modulated norm, projection and unpatchify -> float32 [B,H,W,out_channels]."""
        table = self.scale_shift_table[None] + emb_BxD.astype(jnp.float32)[:, None]
        shift, scale = table[:, :1], table[:, 1:]
        out = self.proj_out(layer_norm(h_BxNxD.astype(jnp.float32)) * (1 + scale) + shift)
        p, (height, width) = self.patch_size, size
        out = out.reshape(-1, height // p, width // p, p, p, self.out_channels)
        return out.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, self.out_channels)

    def prepare(self, cond):
        """Adds the text keys and values of every block: they do not change over the steps."""
        if "prepared" in cond:
            return cond
        context = self.caption_projection(cond["text"])
        if self.is_initializing():
            return {**cond, "prepared": {"kv": None, "context": context}}
        kv = text_keys_values(self.variables["params"]["transformer_blocks"], context)
        return {**cond, "prepared": {"kv": kv, "context": context}}


class PatchEmbed(nn.Module):
    """Non-overlapping patches through a strided convolution -> [B,N,D]."""

    features: int
    patch_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        p = (self.patch_size, self.patch_size)
        h = nn.Conv(self.features, p, p, padding="VALID", dtype=self.dtype, name="proj")(x)
        return h.reshape(h.shape[0], -1, self.features)


def text_keys_values(blocks, context_BxSxD):
    """Keys and values of the text for stacked blocks: two arrays [layers, B, S, D]."""

    def project(name):
        layer, dtype = blocks["attn2"][name], context_BxSxD.dtype
        out = jnp.einsum("bsd,ndf->nbsf", context_BxSxD, layer["kernel"].astype(dtype))
        return out + layer["bias"].astype(dtype)[:, None, None, :]

    return project("to_k"), project("to_v")


def unrolled(num_layers, features):
    """How many layers of a scan to write out.

    A small network on a CPU is unrolled: stacking the residuals of a scan costs it a third of the
    speed of a train step (measured 54 against 71 images/s), and it compiles fast anyway.
    """
    small = features <= 512 and num_layers <= 12 and backend.current() == "cpu"
    return num_layers if small else 1


def remat_options(remat):
    """Arguments of `jax.checkpoint` for the field `remat` ("full" or a policy's name)."""
    policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
    return {"prevent_cse": False, "policy": policy}


def scanned_blocks(num_layers, remat=None, features=0, block=PixArtBlock):
    """`block` scanned over a leading layer axis, with rematerialisation if asked for."""
    if remat is not None:
        block = nn.remat(block, **remat_options(remat))
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
        length=num_layers,
        unroll=unrolled(num_layers, features),
    )

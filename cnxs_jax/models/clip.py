"""CLIP's encoders of text and images (arXiv 2103.00020), as transformers has them.

Fields carry the names of transformers' `CLIPTextConfig` and `CLIPVisionConfig`, parameters its
names (docs/architecture.md). The layers are scanned: `encoder/layers` has a leading layer axis.
"""

import flax.linen as nn
import jax.numpy as jnp

from cnxs_jax.errors import ConfigError, did_you_mean
from cnxs_jax.models.activations import gelu
from cnxs_jax.models.attention import attention
from cnxs_jax.models.layers import Dense

LEGACY_EOS = 2  # what transformers wrote into configs before it had the true id


def quick_gelu(x):
    """x * sigmoid(1.702 x): OpenAI's models; OpenCLIP's have the exact GELU."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def _norm(epsilon, name):
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, name=name)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxLxD, mask_BxL, bias):
        D = x_BxLxD.shape[-1]

        def heads(name):
            h = Dense(D, dtype=self.dtype, name=name)(x_BxLxD)
            return h.reshape(*h.shape[:2], self.num_heads, D // self.num_heads)

        q, k, v = heads("q_proj"), heads("k_proj"), heads("v_proj")
        # "xla": a causal bias in bfloat16, which the fused kernels take, would overflow.
        out = attention(q, k, v, mask_BxS=mask_BxL, bias=bias, impl="xla")
        return Dense(D, dtype=self.dtype, name="out_proj")(out.reshape(x_BxLxD.shape))


class MLP(nn.Module):
    """Linear, activation, linear."""

    intermediate_size: int
    hidden_act: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = Dense(self.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(ACTIVATIONS[self.hidden_act](h))


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP. Carries the layer's input along: (before, x) -> (x, after)."""

    num_heads: int
    intermediate_size: int
    hidden_act: str
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry, mask_BxL, bias):
        _, x = carry
        h = _norm(self.epsilon, "layer_norm1")(x).astype(self.dtype)
        attend = SelfAttention(self.num_heads, self.dtype, name="self_attn")
        y = x + attend(h, mask_BxL, bias).astype(jnp.float32)
        h = _norm(self.epsilon, "layer_norm2")(y).astype(self.dtype)
        feed = MLP(self.intermediate_size, self.hidden_act, self.dtype, name="mlp")
        return (x, y + feed(h).astype(jnp.float32)), None


class Encoder(nn.Module):
    """All layers -> (input of the last layer, its output); the residual stream is float32."""

    config: nn.Module

    @nn.compact
    def __call__(self, x_BxLxD, mask_BxL=None, bias=None):
        c = self.config
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_hidden_layers,
        )
        sizes = c.num_attention_heads, c.intermediate_size, c.hidden_act, c.layer_norm_eps, c.dtype
        x = x_BxLxD.astype(jnp.float32)
        return layers(*sizes, name="layers")((x, x), mask_BxL, bias)[0]


class TextEmbeddings(nn.Module):
    """Token and position embeddings."""

    config: nn.Module

    @nn.compact
    def __call__(self, ids):
        c, init = self.config, nn.initializers.normal(0.02)
        tokens = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=init, name="token_embedding")
        positions = nn.Embed(
            c.max_position_embeddings, c.hidden_size, embedding_init=init, name="position_embedding"
        )
        return tokens(ids) + positions(jnp.arange(ids.shape[1]))[None]


class TextTransformer(nn.Module):
    """Causal transformer -> (input of the last layer, its output after the final norm)."""

    config: nn.Module

    @nn.compact
    def __call__(self, ids, mask=None):
        length = ids.shape[1]
        future = jnp.triu(jnp.ones((length, length), bool), 1)
        bias = jnp.where(future, jnp.finfo(jnp.float32).min, 0.0)[None, None]
        h = TextEmbeddings(self.config, name="embeddings")(ids)
        before, h = Encoder(self.config, name="encoder")(h, mask, bias)
        return before, _norm(self.config.layer_norm_eps, "final_layer_norm")(h)


class CLIPTextModel(nn.Module):
    """`apply({"params": p}, ids [B,L] int32, mask=None) -> {"last", "penultimate", "pooled"}`.

    `last` [B,L,D] is the normed output, `penultimate` [B,L,D] the last layer's input (transformers'
    `hidden_states[-2]`, not normed), `pooled` [B,D] is `last` at the end-of-text token; float32.
    L is at most `max_position_embeddings`. Ids must lie below `vocab_size` (others give NaN).

    Args:
        eos_token_id: the first such token is pooled. 2 means what old configs mean by it: the
            place of the largest id.
        hidden_act: "quick_gelu" (OpenAI) or "gelu" (OpenCLIP).
        projection_dim: of a projection that this class does not have.

    Raises ConfigError for ids or a mask of a wrong shape and for an unknown activation.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        check(self)
        self.text_model = TextTransformer(self.clone(parent=None, name=None))

    def __call__(self, ids, mask=None):
        return self.encode(ids, mask)

    def encode(self, ids, mask=None):
        """The three outputs without projection."""
        limit, where = self.max_position_embeddings, "clip input"
        if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
            got = f"{list(ids.shape)} and {None if mask is None else list(mask.shape)}"
            raise ConfigError(f"ids and mask must both be [B,L], got {got}", where)
        if ids.shape[1] > limit:
            raise ConfigError(f"{ids.shape[1]} tokens, the model has {limit} positions", where)
        before, last = self.text_model(ids, mask)
        legacy = self.eos_token_id == LEGACY_EOS
        end = jnp.argmax(ids if legacy else ids == self.eos_token_id, axis=-1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        return {"last": last, "penultimate": before, "pooled": pooled}


class CLIPTextModelWithProjection(CLIPTextModel):
    """The same with a linear projection: `pooled` is [B,projection_dim]."""

    def setup(self):
        super().setup()
        self.text_projection = Dense(self.projection_dim, use_bias=False, dtype=jnp.float32)

    def __call__(self, ids, mask=None):
        out = self.encode(ids, mask)
        return {**out, "pooled": self.text_projection(out["pooled"])}


class VisionEmbeddings(nn.Module):
    """A class token and the patches, with position embeddings."""

    config: nn.Module

    @nn.compact
    def __call__(self, images):
        c, D = self.config, self.config.hidden_size
        p, init = (c.patch_size, c.patch_size), nn.initializers.normal(0.02)
        embed = nn.Conv(
            D, p, p, padding="VALID", use_bias=False, dtype=c.dtype, name="patch_embedding"
        )
        patches = embed(images.astype(c.dtype)).reshape(images.shape[0], -1, D)
        token = self.param("class_embedding", nn.initializers.normal(D**-0.5), (D,))
        token = jnp.broadcast_to(token[None, None], (images.shape[0], 1, D))
        h = jnp.concatenate([token.astype(jnp.float32), patches.astype(jnp.float32)], axis=1)
        positions = nn.Embed(h.shape[1], D, embedding_init=init, name="position_embedding")
        return h + positions(jnp.arange(h.shape[1]))[None]


class VisionTransformer(nn.Module):
    """Images -> the normed class token [B,D]."""

    config: nn.Module

    @nn.compact
    def __call__(self, images):
        epsilon = self.config.layer_norm_eps
        h = VisionEmbeddings(self.config, name="embeddings")(images)
        h = _norm(epsilon, "pre_layrnorm")(h)  # the misspelling is in the checkpoints
        _, h = Encoder(self.config, name="encoder")(h)
        return _norm(epsilon, "post_layernorm")(h[:, 0])


class CLIPVisionModelWithProjection(nn.Module):
    """`apply({"params": p}, images [B,S,S,3]) -> [B,projection_dim]` float32, not normalised.

    Images are resized to S = `image_size` and have CLIP's mean subtracted and are divided by its
    standard deviation before. Raises ConfigError for another size.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    projection_dim: int = 768
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        check(self)
        self.vision_model = VisionTransformer(self.clone(parent=None, name=None))
        self.visual_projection = Dense(self.projection_dim, use_bias=False, dtype=jnp.float32)

    def __call__(self, images):
        expected = (self.image_size, self.image_size, self.num_channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            got = list(images.shape)
            raise ConfigError(f"expected [B,{','.join(map(str, expected))}], got {got}", "images")
        return self.visual_projection(self.vision_model(images))


def check(config):
    """Raises ConfigError for an unknown activation or heads that do not divide the width."""
    act, where = config.hidden_act, "clip config"
    if act not in ACTIVATIONS:
        what = f"hidden_act {act!r} is not supported.{did_you_mean(act, ACTIVATIONS)}"
        raise ConfigError(what, where, f"one of {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"hidden_size {config.hidden_size} is not divisible by "
            f"num_attention_heads {config.num_attention_heads}",
            where,
        )

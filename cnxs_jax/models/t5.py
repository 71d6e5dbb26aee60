"""The T5 text encoder (arXiv 1910.10683; v1.1 with gated GELU), transformers' `T5EncoderModel`.

Fields carry the names of transformers' `T5Config`, parameters its names (docs/architecture.md).
The blocks are scanned: `encoder/block` has a leading layer axis. Only the first layer owns a
relative position bias, which all layers share, so it lies outside of the scan at
`encoder/relative_attention_bias/embedding`
(`encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight` in PyTorch).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.errors import ConfigError, did_you_mean
from cnxs_jax.models.activations import gelu_tanh
from cnxs_jax.models.attention import attention
from cnxs_jax.models.parameters import parameter
from cnxs_jax.models.style_words import with_words

FEED_FORWARDS = ("gated-gelu", "relu")
QUANTIZATIONS = (None, "int8")


def position_buckets(length, num_buckets, max_distance):
    """Bucket of every (query, key) pair, int32 [length, length], bidirectional.

    Half of the buckets for each direction; near distances get one each, far ones share
    logarithmically growing ranges up to `max_distance`. float32 as in PyTorch, whose rounding
    decides the bucket of distances at the edge of a range.
    """
    positions = np.arange(length)
    offset = positions[None, :] - positions[:, None]
    half, distance = num_buckets // 2, np.abs(offset)
    exact = half // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)


class RMSNorm(nn.Module):
    """x / rms(x) * scale in float32 (T5LayerNorm: no mean, no bias)."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return x * inverse * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class Linear(nn.Module):
    """x @ kernel without bias.

    With `quantization="int8"` the kernel is int8 and `kernel_scale` [1, features] float32 gives the
    size of its unit in each output channel. The integers are exact in bfloat16, so the scale is all
    that is lost, and it is applied to the product in float32.
    """

    features: int
    std: float
    dtype: jnp.dtype
    quantization: str | None = None

    @nn.compact
    def __call__(self, x):
        shape, x = (x.shape[-1], self.features), x.astype(self.dtype)
        if self.quantization is None:
            kernel = self.param("kernel", nn.initializers.normal(self.std), shape)
            return x @ kernel.astype(self.dtype)
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.int8)
        scale = self.param("kernel_scale", nn.initializers.ones, (1, self.features))
        product = jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return (product * scale).astype(self.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention whose logits are not scaled: T5 folds 1/sqrt(d_kv) into its init."""

    num_heads: int
    d_kv: int
    dtype: jnp.dtype
    quantization: str | None = None

    @nn.compact
    def __call__(self, x_BxLxD, bias_1xHxLxL, mask_BxL):
        D, inner = x_BxLxD.shape[-1], self.num_heads * self.d_kv

        def dense(features, std, name):
            return Linear(features, std, self.dtype, self.quantization, name=name)

        def heads(name, std):
            h = dense(inner, std, name)(x_BxLxD)
            return h.reshape(*h.shape[:2], self.num_heads, self.d_kv)

        q, k, v = heads("q", (D * self.d_kv) ** -0.5), heads("k", D**-0.5), heads("v", D**-0.5)
        # "xla": the fused kernels would round the position bias to bfloat16.
        out = attention(
            q, k, v, mask_BxS=mask_BxL, bias=bias_1xHxLxL, scale=1.0, impl="xla"
        ).reshape(*x_BxLxD.shape[:2], inner)
        return dense(D, inner**-0.5, "o")(out)


class FeedForward(nn.Module):
    """Gated GELU (tanh form) or ReLU; `wo` in float32, whose products overflow float16."""

    d_ff: int
    kind: str
    dtype: jnp.dtype
    quantization: str | None = None

    @nn.compact
    def __call__(self, x):
        D = x.shape[-1]

        def wi(name):
            return Linear(self.d_ff, D**-0.5, self.dtype, self.quantization, name=name)(x)

        h = nn.relu(wi("wi")) if self.kind == "relu" else gelu_tanh(wi("wi_0")) * wi("wi_1")
        return Linear(D, self.d_ff**-0.5, jnp.float32, self.quantization, name="wo")(h)


class AttentionLayer(nn.Module):
    """Pre-norm self-attention with a residual (`layer.0`)."""

    num_heads: int
    d_kv: int
    epsilon: float
    dtype: jnp.dtype
    quantization: str | None = None

    @nn.compact
    def __call__(self, x, bias, mask):
        h = RMSNorm(self.epsilon, name="layer_norm")(x).astype(self.dtype)
        sizes = self.num_heads, self.d_kv, self.dtype, self.quantization
        layer = SelfAttention(*sizes, name="SelfAttention")
        return x + layer(h, bias, mask).astype(x.dtype)


class FeedForwardLayer(nn.Module):
    """Pre-norm feed-forward with a residual (`layer.1`)."""

    d_ff: int
    kind: str
    epsilon: float
    dtype: jnp.dtype
    quantization: str | None = None

    @nn.compact
    def __call__(self, x):
        h = RMSNorm(self.epsilon, name="layer_norm")(x).astype(self.dtype)
        sizes = self.d_ff, self.kind, self.dtype, self.quantization
        return x + FeedForward(*sizes, name="DenseReluDense")(h)


class T5Block(nn.Module):
    """Attention and feed-forward; the residual stream stays float32 in every compute dtype."""

    num_heads: int
    d_kv: int
    d_ff: int
    kind: str
    epsilon: float
    dtype: jnp.dtype
    quantization: str | None = None

    @nn.compact
    def __call__(self, x, bias, mask):
        rest = self.epsilon, self.dtype, self.quantization
        attend = AttentionLayer(self.num_heads, self.d_kv, *rest, name="layer_0")
        feed = FeedForwardLayer(self.d_ff, self.kind, *rest, name="layer_1")
        return feed(attend(x, bias, mask)), None


def position_bias(key, shape, dtype=jnp.float32):
    """Initial bias [buckets, heads]: a quarter of the heads look back only, a quarter ahead.

    T5's own start, normal of about 0.1 beside logits of several units, says nothing about order,
    and a bias moves by a learning rate a step: a small encoder never got there.
    """
    buckets, heads = shape
    side = heads // 4
    bias = np.zeros(shape, np.float32)  # of keys at the query itself, before it, after it
    bias[0, : 2 * side] = bias[buckets // 2 :, :side] = -8
    bias[1 : buckets // 2, side : 2 * side] = -8
    return nn.initializers.normal(0.1)(key, shape, dtype) + bias


class T5Stack(nn.Module):
    """Position bias, scanned blocks and the final norm."""

    config: "T5Encoder"

    @nn.compact
    def __call__(self, x_BxLxD, mask_BxL):
        c = self.config
        table = nn.Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            embedding_init=position_bias,
            name="relative_attention_bias",
        )
        buckets = position_buckets(
            x_BxLxD.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        bias_1xHxLxL = table(jnp.asarray(buckets)).transpose(2, 0, 1)[None].astype(jnp.float32)
        block = nn.remat(T5Block, prevent_cse=False) if c.remat else T5Block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )
        x, _ = blocks(*c.block_fields, name="block")(x_BxLxD, bias_1xHxLxL, mask_BxL)
        return RMSNorm(c.layer_norm_epsilon, name="final_layer_norm")(x)


class T5Encoder(nn.Module):
    """`apply({"params": p}, ids [B,L] int32, mask [B,L]) -> [B,L,d_model]` float32.

    With `words` [B,n,d_model] as a third argument the id -1-k stands for pseudo-word k of its row
    (`models.style_words`). Padded positions (mask 0) influence no other position; their own outputs
    are finite and mean nothing, also where a whole row is padded. Ids must lie below `vocab_size`
    (the tokenizer's matter; others give NaN). Compute dtype float32 or bfloat16: `wo`'s outputs
    overflow float16 (ConfigError).

    Args:
        feed_forward_proj: "gated-gelu" (v1.1) or "relu" (v1.0).
        remat: recompute each block in the backward pass.
        quantization: "int8": the kernels of the blocks are int8, see `Linear`; for inference.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    quantization: str | None = None

    @property
    def block_fields(self):
        """The fields of this encoder's `T5Block`."""
        sizes = self.num_heads, self.d_kv, self.d_ff, self.feed_forward_proj
        return *sizes, self.layer_norm_epsilon, self.dtype, self.quantization

    def setup(self):
        if jnp.dtype(self.dtype) == jnp.float16:
            raise ConfigError("T5 overflows in float16", "t5 dtype", "use float32 or bfloat16")
        kind = self.feed_forward_proj
        if kind not in FEED_FORWARDS:
            raise ConfigError(
                f"feed_forward_proj {kind!r} is not supported.{did_you_mean(kind, FEED_FORWARDS)}",
                "text encoder config",
                f"one of {', '.join(FEED_FORWARDS)}",
            )
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization {self.quantization!r} is not supported",
                "t5",
                f"one of {QUANTIZATIONS}",
            )
        init = nn.initializers.normal(1.0)
        self.shared = nn.Embed(self.vocab_size, self.d_model, embedding_init=init)
        self.encoder = T5Stack(self.clone(parent=None, name=None))

    def __call__(self, ids, mask=None, words=None):
        if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
            got = f"{list(ids.shape)} and {None if mask is None else list(mask.shape)}"
            raise ConfigError(f"ids and mask must both be [B,L], got {got}", "t5 input")
        mask = jnp.ones(ids.shape, jnp.int32) if mask is None else mask
        if words is None:
            return self.encoder(self.shared(ids).astype(jnp.float32), mask)
        x = self.shared(jnp.maximum(ids, 0)).astype(jnp.float32)
        return self.encoder(with_words(x, ids, words), mask)

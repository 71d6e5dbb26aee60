"""Small layers shared by the networks. Parameters float32, norms and embeddings in float32."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnxs_jax import backend
from cnxs_jax.models.activations import gelu_tanh, silu
from cnxs_jax.models.attention import attention
from cnxs_jax.models.painting import score_bias
from cnxs_jax.models.parameters import parameter


def sinusoid(t, dim, max_period=10000.0, flip_sin_to_cos=True, downscale_freq_shift=0.0):
    """Sinusoidal embedding of `t` [N] -> float32 [N, dim].

    `t` is taken to float32 here and never to half precision: bfloat16 leaves 507 of 1000 timesteps
    distinct. The defaults (cosines first, no shift) are those of PixArt and Stable Diffusion.
    """
    half = dim // 2
    exponent = -math.log(max_period) * jnp.arange(half, dtype=jnp.float32)
    angles = (
        t.astype(jnp.float32)[:, None] * jnp.exp(exponent / (half - downscale_freq_shift))[None]
    )
    parts = (
        (jnp.cos(angles), jnp.sin(angles))
        if flip_sin_to_cos
        else (
            jnp.sin(angles),
            jnp.cos(angles),
        )
    )
    return jnp.concatenate(parts, axis=-1)


def layer_norm(x, epsilon=1e-6):
    """LayerNorm over the last axis without affine parameters; float32 inside, two passes."""
    h = x.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + epsilon)
    return h.astype(x.dtype)


def halved():
    """Whether products on a CPU take bfloat16 factors, as `jax.default_matmul_precision` says.

    XLA's CPU compiler ignores that setting. With bfloat16 factors and a float32 sum it reaches
    the tile units of recent x86 cores (AMX), at several times the speed of float32
    (`precision.bfloat16_is_faster` measures it). Arrays stay float32: elementwise work on bfloat16
    is slower there.
    """
    return jax.config.jax_default_matmul_precision == "bfloat16"


def _product(a, b, b_axis=0):
    """bfloat16 `a [M, K] @ b [K, N]` (`b_axis` 1: b is [N, K]), a float32 sum."""
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jax.lax.dot_general(
        a, b, (((1,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _transposed(x):
    """x.T in two parts: XLA would fold a whole transpose into the product, which is slow there.

    Parts of the columns: rows are spread over the devices, which would have to exchange theirs.
    """
    middle = x.shape[1] // 2
    return jnp.concatenate([x[:, :middle].T, x[:, middle:].T], axis=0)


def _kept(x):
    """`x`, computed once: XLA repeats cheap producers in each consumer, but not a window."""
    ones = (1,) * x.ndim
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, ones, ones, "VALID")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, kernel, half):
    if not half:
        return x @ kernel
    return _product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


def _matmul_forward(x, kernel, half):
    # XLA's CPU compiler fuses elementwise producers into the transposed operand of the weight
    # gradient and then computes them strided, without vector instructions: the barriers make the
    # activations real arrays (measured: a train step of the small DiT takes half the time).
    x = _kept(x) if half else jax.lax.optimization_barrier(x)
    return _matmul(x, kernel, half), (x, kernel)


def _matmul_backward(half, residuals, g):
    x, kernel = jax.lax.optimization_barrier(residuals)
    g = _kept(g) if half else jax.lax.optimization_barrier(g)
    rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if not half:
        return g @ kernel.T, jax.lax.dot_general(*rows, (((0,), (0,)), ((), ())))
    narrow_x = x.shape[-1] <= g.shape[-1]  # the narrower of the two is transposed
    narrow, wide = rows if narrow_x else rows[::-1]
    gradient = _product(_transposed(narrow), wide)
    return (
        _product(rows[1], kernel, b_axis=1).reshape(x.shape),
        gradient if narrow_x else _transposed(gradient),
    )


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
    """`nn.Dense` whose gradient is also fast on a CPU. `x [..., C] -> [..., features]`."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x):
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if backend.current() == "cpu":
            x = _matmul(x, kernel, halved() and x.dtype == jnp.float32)
        else:
            x = x @ kernel
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
            x = x + bias.astype(self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return x


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear (diffusers `TimestepEmbedding`).

    `condition` [B,E] is projected without bias and added to the input (LCM's guidance embedding).
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, condition=None):
        x = x.astype(self.dtype)
        if condition is not None:
            project = Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")
            x = x + project(condition.astype(self.dtype))
        x = Dense(self.features, dtype=self.dtype, name="linear_1")(x)
        return Dense(self.features, dtype=self.dtype, name="linear_2")(silu(x))


class Activation(nn.Module):
    """Linear and a tanh-approximated GELU (diffusers `GELU`)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = Dense(self.features, dtype=self.dtype, name="proj")(x)
        return gelu_tanh(x)


class FeedForward(nn.Module):
    """Linear, GELU(tanh), Linear (diffusers `FeedForward`, `gelu-approximate`)."""

    inner: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = Activation(self.inner, self.dtype, name="net_0")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(h)


class Attention(nn.Module):
    """Multi-head self- or cross-attention (diffusers `Attention`).

    Keys and values come from `kv` where the caller has computed them (they do not change over the
    sampling steps), else from `context`, else from `x` itself. `paint` moves the scores towards
    painted words, see `painting`.
    """

    num_heads: int
    head_dim: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    impl: str | None = None
    out_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x_BxLxC, context_BxSxC=None, mask_BxS=None, kv=None, paint=None):
        inner = self.num_heads * self.head_dim

        def project(name, h):
            return Dense(inner, use_bias=self.use_bias, dtype=self.dtype, name=name)(h)

        def heads(h):
            return h.reshape(*h.shape[:-1], self.num_heads, self.head_dim)

        context = x_BxLxC if context_BxSxC is None else context_BxSxC
        q = project("to_q", x_BxLxC)
        k, v = kv if kv is not None else (project("to_k", context), project("to_v", context))
        q, k, v = heads(q), heads(k), heads(v)
        bias = None if paint is None else score_bias(paint, q, k, mask_BxS)
        out = attention(q, k, v, mask_BxS=mask_BxS, bias=bias, impl=self.impl)
        out = out.reshape(*x_BxLxC.shape[:-1], inner)
        features, init = x_BxLxC.shape[-1], self.out_init
        return Dense(features, dtype=self.dtype, kernel_init=init, name="to_out_0")(out)

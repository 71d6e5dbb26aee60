"""Small layers shared by the networks. Parameters float32, norms and embeddings in float32."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnxs_jax.models.attention import attention


def sinusoid(t, dim, max_period=10000.0, flip_sin_to_cos=True, downscale_freq_shift=0.0):
    """Sinusoidal embedding of `t` [N] -> float32 [N, dim].

    `t` is taken to float32 here and never to half precision: bfloat16 leaves 507 of 1000 timesteps
    distinct. The defaults (cosines first, no shift) are those of PixArt and Stable Diffusion.
    """
    half = dim // 2
    exponent = -math.log(max_period) * jnp.arange(half, dtype=jnp.float32)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(exponent / (half - downscale_freq_shift))
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


@jax.custom_vjp
def _matmul(x, kernel):
    return x @ kernel


def _matmul_forward(x, kernel):
    # XLA's CPU compiler fuses elementwise producers into the transposed operand of the weight
    # gradient and then computes them strided, without vector instructions: the barriers make the
    # activations real arrays (measured: a train step of the small DiT takes half the time).
    x = jax.lax.optimization_barrier(x)
    return x @ kernel, (x, kernel)


def _matmul_backward(residuals, g):
    x, kernel = jax.lax.optimization_barrier(residuals)
    g = jax.lax.optimization_barrier(g)
    rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return g @ kernel.T, jax.lax.dot_general(*rows, (((0,), (0,)), ((), ())))


_matmul.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
    """`nn.Dense` whose gradient is also fast on a CPU. `x [..., C] -> [..., features]`."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        x = _matmul(x, kernel) if jax.default_backend() == "cpu" else x @ kernel
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            x = x + bias.astype(self.dtype)
        return x


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear (diffusers `TimestepEmbedding`)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = Dense(self.features, dtype=self.dtype, name="linear_1")(x.astype(self.dtype))
        return Dense(self.features, dtype=self.dtype, name="linear_2")(nn.silu(x))


class Activation(nn.Module):
    """Linear and a tanh-approximated GELU (diffusers `GELU`)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = Dense(self.features, dtype=self.dtype, name="proj")(x)
        return nn.gelu(x, approximate=True)


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
    sampling steps), else from `context`, else from `x` itself.
    """

    num_heads: int
    head_dim: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    impl: str | None = None

    @nn.compact
    def __call__(self, x_BxLxC, context_BxSxC=None, mask_BxS=None, kv=None):
        inner = self.num_heads * self.head_dim

        def project(name, h):
            return Dense(inner, use_bias=self.use_bias, dtype=self.dtype, name=name)(h)

        def heads(h):
            return h.reshape(*h.shape[:-1], self.num_heads, self.head_dim)

        context = x_BxLxC if context_BxSxC is None else context_BxSxC
        q = project("to_q", x_BxLxC)
        k, v = kv if kv is not None else (project("to_k", context), project("to_v", context))
        out = attention(heads(q), heads(k), heads(v), mask_BxS=mask_BxS, impl=self.impl)
        out = out.reshape(*x_BxLxC.shape[:-1], inner)
        return Dense(x_BxLxC.shape[-1], dtype=self.dtype, name="to_out_0")(out)

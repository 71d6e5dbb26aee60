"""SiLU and GELU whose gradient keeps the input alone, as PyTorch's does.

Differentiated by rule, each keeps more arrays of the input's size until the backward pass: the
sigmoid, or the error function and the exponential. Without them a ControlNet-XS train step on
Stable Diffusion 1.5 at 512 px is planned at 3,411 MiB instead of 3,776.
"""

import functools
import math

import jax
import jax.numpy as jnp


def _activation(slope):
    """`function` with the gradient `slope(x)`, both elementwise; half precision is left inside."""

    def wrap(function):
        wrapped = functools.wraps(function)(jax.custom_vjp(function))

        def backward(x, g):
            found = g.astype(jnp.float32) * slope(x.astype(jnp.float32))
            return (found.astype(x.dtype),)

        wrapped.defvjp(lambda x: (function(x), x), backward)
        return wrapped

    return wrap


def _silu_slope(x):
    s = jax.nn.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def _gelu_slope(x):
    density = jnp.exp(-0.5 * x * x) * (0.5 / math.pi) ** 0.5
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5)) + x * density


def _gelu_tanh_slope(x):
    c, k = 2.0 * (2.0 / math.pi) ** 0.5, 0.044715
    s = jax.nn.sigmoid(c * (x + k * x * x * x))  # (1 + tanh(c x / 2 + ...)) / 2
    return s * (1.0 + x * (1.0 - s) * c * (1.0 + 3.0 * k * x * x))


@_activation(_silu_slope)
def silu(x):
    """x sigmoid(x), also called swish."""
    return jax.nn.silu(x)


@_activation(_gelu_slope)
def gelu(x):
    """x times the normal distribution function, exactly."""
    return jax.nn.gelu(x, approximate=False)


@_activation(_gelu_tanh_slope)
def gelu_tanh(x):
    """GELU by its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)

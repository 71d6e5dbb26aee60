"""Activations: the values and gradients of their formulas, one array kept for the gradient."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.models import activations

BY_RULE = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}
IN_FLOAT64 = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x * 0.5**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
}
X = jnp.linspace(-12.0, 12.0, 4001)


@pytest.mark.parametrize("name", BY_RULE)
def test_values_and_gradients_are_those_of_the_rule(name):
    own, rule = getattr(activations, name), BY_RULE[name]
    np.testing.assert_array_equal(own(X), rule(X))
    x, h = np.asarray(X, np.float64), 1e-5
    exact = (IN_FLOAT64[name](x + h) - IN_FLOAT64[name](x - h)) / (2 * h)
    np.testing.assert_allclose(jax.vmap(jax.grad(own))(X), exact, atol=3e-6)


@pytest.mark.parametrize("name", BY_RULE)
def test_half_precision_has_the_gradient_rounded_once(name):
    x = X.astype(jnp.bfloat16)
    own = getattr(activations, name)
    found = jax.vmap(jax.grad(lambda v: own(v).astype(jnp.float32)))(x)
    exact = jax.vmap(jax.grad(BY_RULE[name]))(x.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)


def kept(function):
    """Number of arrays of the input's size that the gradient keeps."""
    residuals = jax.vjp(function, X)[1]
    return sum(leaf.shape == X.shape for leaf in jax.tree.leaves(residuals))


@pytest.mark.parametrize("name", BY_RULE)
def test_the_gradient_keeps_the_input_alone(name):
    assert kept(getattr(activations, name)) == 1
    assert kept(BY_RULE[name]) > 1

"""Activations: PyTorch's values and gradients, and one array kept for the gradient."""

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
X = jnp.linspace(-12.0, 12.0, 4001)


@pytest.mark.parametrize("name", BY_RULE)
def test_values_and_gradients_are_those_of_the_rule(name):
    own, rule = getattr(activations, name), BY_RULE[name]
    np.testing.assert_array_equal(own(X), rule(X))
    with jax.enable_x64():
        wide = jnp.asarray(np.asarray(X), jnp.float64)
        exact = np.asarray(jax.vmap(jax.grad(rule))(wide))
    found = jax.vmap(jax.grad(own))(X)
    np.testing.assert_allclose(found, exact, atol=3e-6)  # of slopes up to 1.13


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

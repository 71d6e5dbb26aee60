"""Parameters are those of Flax, and their initialisers run where a network is made alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from cnxs_jax.models.conv import Conv
from cnxs_jax.models.layers import Dense

X = jnp.ones((2, 6, 6, 3))
PAIRS = [
    (Dense(5), nn.Dense(5, kernel_init=nn.initializers.xavier_uniform())),
    (Conv(5), nn.Conv(5, (3, 3))),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["Dense", "Conv"])
def test_a_key_gives_the_weights_that_flax_draws(ours, theirs):
    own, other = (jax.jit(m.init)(jax.random.key(7), X)["params"] for m in (ours, theirs))
    assert own["kernel"].std() > 0.1
    jax.tree.map(np.testing.assert_array_equal, own, other)
    eager = ours.init(jax.random.key(7), X)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, own)


def test_a_network_with_weights_is_traced_without_its_initialisers():
    calls = []

    def counted(key, shape):
        calls.append(shape)
        return jnp.ones(shape)

    def refused(key, shape):
        raise AssertionError("asked")

    layer = Dense(5, kernel_init=counted)
    params = layer.init(jax.random.key(0), X)
    layer.init(jax.random.key(1), X)
    assert calls == [(3, 5)]  # one program a shape
    out = jax.jit(Dense(5, kernel_init=refused).apply)(params, X)
    np.testing.assert_array_equal(out, np.full((*X.shape[:-1], 5), 3.0))


@pytest.mark.parametrize("layer", [Dense(5), Conv(5)], ids=["Dense", "Conv"])
def test_weights_of_another_shape_or_none_are_named(layer):
    params = layer.init(jax.random.key(0), X)
    with pytest.raises(errors.ScopeParamShapeError, match="kernel"):
        layer.apply(params, X[..., :2])
    del params["params"]["bias"]
    with pytest.raises(errors.ScopeParamNotFoundError, match="bias"):
        layer.apply(params, X)

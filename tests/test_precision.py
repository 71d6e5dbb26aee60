"""bfloat16 factors on a CPU: near the float32 product, with gradients, only where asked for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import precision, sharding
from cnxs_jax.models.layers import Dense
from tests.programs import exchanges

X = jax.random.normal(jax.random.key(0), (4, 8, 24))


def value_and_grads(features, name):
    """(y, gradients of a weighted sum of y) of a Dense layer at a precision."""
    with precision.matmul(name):
        layer = Dense(features)
        params = layer.init(jax.random.key(1), X)
        weight = jax.random.normal(jax.random.key(2), (*X.shape[:-1], features))

        def loss(params, x):
            return (layer.apply(params, x) * weight).sum()

        y = jax.jit(layer.apply)(params, X)
        return y, jax.jit(jax.grad(loss, argnums=(0, 1)))(params, X)


def distance(a, b):
    """The largest relative distance (of norms) between two trees' leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs)


@pytest.mark.parametrize("features", [16, 40])  # narrower and wider than the input
def test_bfloat16_products_round_their_factors_only(features):
    """Two factors of 8 bits: a relative error of about 2^-9, and everything else float32."""
    exact, rounded = (value_and_grads(features, name) for name in ("float32", "bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    assert 2e-4 < distance(rounded[0], exact[0]) < 6e-3  # it is rounded, and no more than that
    assert distance(rounded[1], exact[1]) < 6e-3


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("features", [16, 40])
def test_devices_exchange_the_sum_of_the_gradient_alone(features, name):
    """Rows that are spread over two devices stay where they are, transposed or not."""
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    with precision.matmul(name):
        layer = Dense(features)
        params = layer.init(jax.random.key(1), X)

        def loss(params, x):
            return jnp.square(layer.apply(params, x)).sum()

        x = sharding.put_batch(np.asarray(X), mesh)
        params = sharding.put(params, sharding.replicated(mesh))
        assert exchanges(jax.jit(jax.grad(loss)).lower(params, x).compile()) == {"all-reduce"}


def test_float32_is_the_plain_product():
    y, (grads, _) = value_and_grads(16, "float32")
    plain = nn.Dense(16, kernel_init=nn.initializers.xavier_uniform())
    params = plain.init(jax.random.key(1), X)
    np.testing.assert_allclose(y, plain.apply(params, X), rtol=1e-6, atol=1e-6)


def test_none_leaves_the_setting_alone():
    with precision.matmul("bfloat16"), precision.matmul(None):
        assert jax.config.jax_default_matmul_precision == "bfloat16"


@pytest.mark.parametrize(
    ("ratio", "processes", "expected"), [(1.4, 1, None), (3.0, 1, "bfloat16"), (3.0, 2, None)]
)
def test_auto_follows_the_clock_of_one_process(monkeypatch, ratio, processes, expected):
    seconds = {jnp.float32: ratio, jnp.bfloat16: 1.0}
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(precision, "_seconds", seconds.__getitem__)
    precision.bfloat16_is_faster.cache_clear()
    with precision.matmul("auto"):
        assert jax.config.jax_default_matmul_precision == expected
    precision.bfloat16_is_faster.cache_clear()

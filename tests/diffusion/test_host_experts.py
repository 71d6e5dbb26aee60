"""Experts that lie in host memory: one on the device at a time, one program for all of them."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.diffusion import experts, guidance, sampling, schedule, solvers
from cnxs_jax.errors import ConfigError

LINEAR = schedule.linear()
X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
TREES = tuple(
    {"w": np.random.default_rng(i).normal(size=(2, 2)).astype(np.float32)} for i in range(3)
)
TABLES = {
    "deis": solvers.deis(LINEAR, 8, order=3),
    "ddim eta": solvers.ddim(LINEAR, 8, eta=1.0),
    "lcm": solvers.lcm(LINEAR, 8),
}


def network(params, x, t, cond):
    shift = jnp.sin(t / 300) + cond["shift"]
    return jnp.tanh(x @ params["w"] + shift[:, None, None, None])


DENOISE = guidance.cfg(network)
COND = {
    "shift": jnp.array([0.1, 0.2, 0.3]),
    "guidance_scale": jnp.full(3, 2.0),
    "null": {"shift": jnp.zeros(3)},
}


def routed(name):
    return experts.route(TABLES[name], [300, 700], by="t").with_guidance_off(0.0, 0.3)


@pytest.mark.parametrize("name", TABLES)
def test_it_draws_what_the_compiled_loop_draws(name):
    table, key = routed(name), jax.random.key(3)
    want = jax.jit(lambda p, t: sampling.sample(DENOISE, p, X, COND, t, key=key))(TREES, table)
    got = sampling.sample_from_host(DENOISE, TREES, X, COND, table, key=key)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    others = sampling.sample_from_host(DENOISE, TREES[::-1], X, COND, table, key=key)
    assert np.abs(others - want).max() > 1e-2


def test_the_row_is_compiled_once_and_no_two_experts_are_on_the_device():
    table, alive, loads = experts.route(TABLES["deis"], [300, 700], by="t"), [], []

    def load(tree):
        assert not any(ref() is not None for ref in alive)
        tree = jax.device_put(tree)
        alive.append(weakref.ref(tree["w"]))
        loads.append(len(alive))
        return tree

    def denoise(params, x, t, cond):
        return network(params, x, t, cond)

    before = sampling._one_row._cache_size()
    sampling.sample_from_host(denoise, TREES, X, {"shift": jnp.zeros(3)}, table, load=load)
    assert loads == [1, 2, 3]
    assert sampling._one_row._cache_size() == before + 1


def test_missing_experts_are_refused():
    with pytest.raises(ConfigError, match="3 experts, params has 2"):
        sampling.sample_from_host(DENOISE, TREES[:2], X, COND, routed("deis"))

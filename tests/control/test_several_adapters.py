"""Several ControlNet-XS on one base: what they add, and how they share the time embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import control
from cnxs_jax.control import controlnet_xs
from cnxs_jax.control.controlled_unet import time_shares
from cnxs_jax.errors import ConfigError
from tests.control.test_controlnet_xs import adapter_of
from tests.control.unets import BASE, BATCH, base_params, inputs, perturbed, run


@pytest.fixture(scope="module")
def base():
    return base_params()


@pytest.fixture(scope="module")
def own():
    """Parameters of an adapter with its own time embedding, noise on every one."""
    adapter = adapter_of(learn_time_embedding=True)
    return perturbed(controlnet_xs.fresh_params(adapter, jax.random.key(1)))


def test_several_adapters_add_up(own, base):
    """Two half-scaled copies of one adapter are that adapter; scales and hints are told apart."""
    adapters, compat = [adapter_of(learn_time_embedding=True)] * 2, "diffusers_pretrained"
    x, t, cond = inputs()
    one, single = control.attach(BASE, base, adapters[0], own, compat)
    expected = run(one, single, x, t, cond)
    two, both = control.attach(BASE, base, adapters, [own, own], compat)
    assert set(both["control"]) == {"adapters_0", "adapters_1"}

    def pair(hints, scales):
        scales = tuple(np.full(BATCH, scale, np.float32) for scale in scales)
        pairs = {"hint": hints, "control_scale": scales}
        doubled = {"connection_scale": (cond["connection_scale"],) * 2}
        return run(two, both, x, t, cond | pairs | doubled)

    hint, other = cond["hint"], 1.0 - cond["hint"]
    np.testing.assert_allclose(pair((hint, hint), (0.5, 0.5)), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(pair((hint, other), (1.0, 0.0)), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(pair((other, hint), (0.0, 1.0)), expected, rtol=0, atol=1e-5)
    assert np.abs(pair((hint, other), (0.0, 1.0)) - expected).max() > 1e-3


@pytest.mark.parametrize("key", ["control_scale", "control_active"])
def test_an_adapter_at_zero_is_absent_beside_another(own, base, key):
    """Official: its share of the time embedding is tied to its scale, and takes none of another's.

    Scales below and above 1: beyond it the other's share is more than the whole, alone or not.
    """
    other = perturbed(own, seed=5)
    adapters = [adapter_of(learn_time_embedding=True, time_embedding_mix=m) for m in (0.9, 0.8)]
    one, single = control.attach(BASE, base, adapters[0], own)
    two, both = control.attach(BASE, base, adapters, [own, other])
    x, t, cond = inputs()
    cond.pop("connection_scale")
    cond |= {"control_scale": np.array([0.4, 1.9], np.float32)}
    expected = run(one, single, x, t, cond)

    def pair(zero):
        values = {"hint": cond["hint"], "control_scale": cond["control_scale"]}
        values |= {"control_active": np.ones(BATCH, np.float32)}
        second = values | {"hint": 1.0 - cond["hint"], key: np.full(BATCH, zero, np.float32)}
        return run(two, both, x, t, cond | {k: (v, second[k]) for k, v in values.items()})

    np.testing.assert_allclose(pair(0.0), expected, rtol=0, atol=1e-5)
    assert np.abs(pair(1.0) - expected).max() > 1e-2


@pytest.mark.slow
def test_two_halves_mix_the_time_as_the_whole(own, base):
    adapter = adapter_of(learn_time_embedding=True)
    one, single = control.attach(BASE, base, adapter, own)
    two, both = control.attach(BASE, base, [adapter] * 2, [own] * 2)
    x, t, cond = inputs()
    cond.pop("connection_scale")
    scale = np.array([0.3, 0.9], np.float32)
    expected = run(one, single, x, t, cond | {"control_scale": scale})
    pair = {"hint": (cond["hint"],) * 2, "control_scale": (0.25 * scale, 0.75 * scale)}
    np.testing.assert_allclose(run(two, both, x, t, cond | pair), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ((1.0, 1.0), r"shape \[\], expected \[2\]"),
        ((np.ones(2, np.float32), np.ones(3, np.float32)), r"shape \[3\], expected \[2\]"),
        (np.ones(2, np.float32), "1 values for 2 adapters"),
    ],
)
def test_each_adapter_has_its_scales(own, base, scales, words):
    two, both = control.attach(BASE, base, [adapter_of(learn_time_embedding=True)] * 2, [own] * 2)
    x, t, cond = inputs()
    cond |= {"hint": (cond["hint"],) * 2, "control_scale": scales}
    with pytest.raises(ConfigError, match=words):
        two.apply({"params": both}, x, t, cond)


def test_shares_of_the_time_embedding():
    """[] of (mixes, their shares): in proportion, the whole unless one alone takes more."""
    for mixes, expected in (
        ((0.5,), (0.5**0.3,)),
        ((1.7, 0.0), (1.7**0.3, 0.0)),
        ((0.2, 0.2), (0.4**0.3 / 2, 0.4**0.3 / 2)),
        ((1.0, 1.0, 2e-3), (1 / 2.002, 1 / 2.002, 1e-3 / 1.001)),
        ((2.0, 2.0), (2.0**0.3 / 2, 2.0**0.3 / 2)),
        ((0.0, 0.0), (0.0, 0.0)),
    ):
        shares = time_shares([jnp.full((1, 1), mix) for mix in mixes])
        np.testing.assert_allclose(np.ravel(shares), expected, rtol=1e-5)

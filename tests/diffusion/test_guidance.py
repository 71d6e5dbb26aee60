"""Classifier-free guidance as a wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.diffusion import guidance, sampling, schedule, solvers
from cnxs_jax.errors import ConfigError

X = jax.random.normal(jax.random.key(0), (3, 2, 2, 2))
T = jnp.array([5.0, 5.0, 5.0])


def network(params, x, t, cond):
    """Its output is the shift plus a tenth of x; four channels, the last two a learned range."""
    out = cond["shift"][:, None, None, None] + 0.1 * x
    if "control_scale" in cond:
        out = out + cond["control_scale"][:, None, None, None]
    return jnp.concatenate([out, 100.0 * out], axis=-1)


COND = {
    "shift": jnp.array([1.0, 2.0, 3.0]),
    "guidance_scale": jnp.array([0.0, 1.0, 4.0]),
    "null": {"shift": jnp.array([0.5, 0.5, 0.5])},
}


def test_guidance_extrapolates_with_each_images_own_scale():
    out = guidance.cfg(network)({}, X, T, COND)
    assert out.shape == X.shape
    # 0: unconditional; 1: conditional; 4: 0.5 + 4 * 2.5.
    np.testing.assert_allclose((out - 0.1 * X)[:, 0, 0, 0], [0.5, 2.0, 10.5], rtol=1e-5)


def test_omega_is_one_less_than_the_scale():
    """LCM's (1 + w) cond - w uncond with w = 4.5."""
    scale = jnp.full(3, guidance.scale_of_omega(4.5))
    out = guidance.cfg(network)({}, X, T, COND | {"guidance_scale": scale})
    want = 5.5 * (COND["shift"] - 0.0) - 4.5 * 0.5
    np.testing.assert_allclose((out - 0.1 * X)[:, 0, 0, 0], want, rtol=1e-5)


def test_without_null_it_is_the_plain_denoiser():
    plain = {k: v for k, v in COND.items() if k != "null"}
    out = guidance.cfg(network)({}, X, T, plain)
    np.testing.assert_array_equal(out, network({}, X, T, plain))


@pytest.mark.parametrize("scale", [1.0, jnp.ones(())])
def test_one_number_for_all_images_is_refused(scale):
    """While sampling, too, where the row's factor is in it already."""
    table = solvers.ddim(schedule.scaled_linear(), 2)
    cond = COND | {"control_scale": scale, "hint": X}
    for run in (
        lambda: guidance.cfg(network)({}, X, T, cond),
        lambda: sampling.sample(guidance.cfg(network), {}, X, cond, table),
    ):
        with pytest.raises(ConfigError, match="one number for all images") as caught:
            run()
        assert caught.value.where == 'cond["control_scale"]'


def test_mistakes_are_refused():
    with pytest.raises(ConfigError, match="guidance_scale"):
        guidance.cfg(network)({}, X, T, {"shift": X, "null": {}})
    with pytest.raises(ConfigError, match="shfit"):
        guidance.cfg(network)({}, X, T, COND | {"null": {"shfit": X}})


STYLED = {
    **COND,
    "style": jnp.ones(3),
    "unstyled": {"style": jnp.zeros(3)},
    "style_scale": jnp.array([0.0, 1.0, 2.0]),
}


def with_style(params, x, t, cond):
    return network(params, x, t, cond) + 10.0 * cond["style"][:, None, None, None]


def test_style_has_a_weight_of_its_own():
    """u + w (c - u) + v (s - c): text alone decides the second term, style alone the third."""
    out = guidance.styled(with_style)({}, X, T, STYLED)
    assert out.shape == X.shape
    want = np.array([0.5, 2.0, 10.5]) + 10.0 * np.array([0.0, 1.0, 2.0])
    np.testing.assert_allclose((out - 0.1 * X)[:, 0, 0, 0], want, rtol=1e-5)


def test_without_a_style_weight_it_is_plain_guidance_and_without_null_no_guidance():
    one = {k: v for k, v in STYLED.items() if k not in ("unstyled", "style_scale")}
    want = guidance.cfg(with_style)({}, X, T, one)
    np.testing.assert_array_equal(guidance.styled(with_style)({}, X, T, one), want)
    row = {k: v for k, v in STYLED.items() if k != "null"}
    plain = {"shift": STYLED["shift"], "style": STYLED["style"]}
    out = guidance.styled(with_style)({}, X, T, row)
    np.testing.assert_array_equal(out, with_style({}, X, T, plain))
    with pytest.raises(ConfigError, match="style_scale"):
        guidance.styled(with_style)({}, X, T, one | {"unstyled": STYLED["unstyled"]})
    with pytest.raises(ConfigError, match="unstyled has keys"):
        guidance.styled(with_style)({}, X, T, STYLED | {"unstyled": {"stile": X}})


@pytest.mark.parametrize("guess", [False, True])
def test_prepared_and_unprepared_agree_and_control_is_scaled_in_both_halves(guess):
    """Guess mode gives the unconditional half no control: `null` overrides its scale."""
    scale = jnp.array([1.0, 2.0, 3.0])
    null = COND["null"] | ({"control_scale": jnp.zeros(3)} if guess else {})
    cond = COND | {"control_scale": scale, "null": null}
    table = solvers.ddim(schedule.linear(), 4, prediction="sample").with_control(0.0, 0.5)
    got = sampling.sample(guidance.cfg(network), {}, X, cond, table)

    def by_hand(params, x, t, c):
        assert "null" not in c
        gated = c["control_scale"]
        full = network(params, x, t, {"shift": cond["shift"], "control_scale": gated})
        off = jnp.zeros(3) if guess else gated
        empty = network(params, x, t, {"shift": null["shift"], "control_scale": off})
        weight = cond["guidance_scale"][:, None, None, None]
        return empty + weight * (full - empty)

    want = sampling.sample(by_hand, {}, X, {"control_scale": scale}, table)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_wrappers_of_equal_denoisers_are_equal():
    """So that building one anew does not compile anew when it is a static argument."""
    assert guidance.cfg(network) == guidance.cfg(network)
    assert hash(guidance.cfg(network)) == hash(guidance.cfg(network))


def test_dynamic_threshold_limits_each_image_by_itself():
    post = guidance.dynamic_threshold(ratio=0.9)
    quiet = 0.5 * jnp.ones((1, 10, 10, 1))
    loud = jnp.linspace(-4.0, 4.0, 100).reshape(1, 10, 10, 1)
    out = post(jnp.concatenate([quiet, loud]))
    np.testing.assert_array_equal(out[:1], quiet)
    loudest = np.abs(np.asarray(out[1]))
    assert loudest.max() == pytest.approx(1.0, abs=1e-6)
    assert np.mean(loudest > 1.0 - 1e-6) == pytest.approx(0.1, abs=0.021)
    static = guidance.dynamic_threshold(max_value=1.0)(loud)
    np.testing.assert_array_equal(static, jnp.clip(loud, -1.0, 1.0))


def test_one_row_of_a_condition_serves_the_batch():
    """In both halves, with and without a null of its own."""
    cond = {"text": jnp.arange(6.0).reshape(3, 2), "scale": jnp.array([0.5])}
    both = guidance.pair(cond, {"text": jnp.full((1, 2), 9.0)})
    np.testing.assert_array_equal(both["text"][:3], cond["text"])
    np.testing.assert_array_equal(both["text"][3:], np.full((3, 2), 9.0))
    np.testing.assert_array_equal(both["scale"], np.full(6, 0.5))

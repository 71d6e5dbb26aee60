"""EDM preconditioning against its defining properties, not its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.diffusion import edm, sampling, schedule, solvers

SIGMA = jnp.array([0.002, 0.05, 0.5, 5.0, 80.0])
KEYS = jax.random.split(jax.random.key(0))
X0 = 0.5 * jax.random.normal(KEYS[0], (5, 16, 16, 8))
NOISE = jax.random.normal(KEYS[1], X0.shape)


def test_input_and_target_have_unit_variance_at_every_level():
    scaled, _ = edm.network_input(X0, NOISE, SIGMA)
    target = edm.network_target(X0, NOISE, SIGMA)
    np.testing.assert_allclose(scaled.std((1, 2, 3)), 1.0, rtol=0.05)
    np.testing.assert_allclose(target.std((1, 2, 3)), 1.0, rtol=0.05)


def test_the_network_that_outputs_the_target_makes_a_perfect_denoiser():
    def network(params, x, t, cond):
        return edm.network_target(X0, NOISE, SIGMA)

    x = X0 + SIGMA[:, None, None, None] * NOISE
    denoised = edm.precondition(network)({}, x, SIGMA, {})
    np.testing.assert_allclose(denoised, X0, atol=2e-5)


def test_an_error_of_the_network_costs_the_same_at_every_level():
    def error_of(shift):
        def network(params, x, t, cond):
            return edm.network_target(X0, NOISE, SIGMA) + shift

        x = X0 + SIGMA[:, None, None, None] * NOISE
        d = edm.precondition(network)({}, x, SIGMA, {})
        return edm.loss_weight(SIGMA) * jnp.square(d - X0).mean((1, 2, 3))

    np.testing.assert_allclose(error_of(1.0), 1.0, rtol=2e-3)


def test_little_noise_keeps_the_input_and_much_noise_ignores_it():
    def silent(params, x, t, cond):
        return jnp.zeros_like(x)

    d = edm.precondition(silent)({}, jnp.ones((5, 1, 1, 1)), SIGMA, {})[:, 0, 0, 0]
    assert float(d[0]) == pytest.approx(1.0, abs=2e-5)
    assert float(d[2]) == pytest.approx(0.5)  # noise and data equally strong
    assert abs(float(d[-1])) < 1e-4


def test_the_network_reads_a_quarter_of_the_logarithm_and_the_level():
    seen = {}

    def spy(params, x, t, cond):
        seen.update(t=t, sigma=cond["sigma"])
        return x

    edm.precondition(spy)({}, X0, SIGMA, {})
    np.testing.assert_allclose(jnp.exp(4.0 * seen["t"]), SIGMA, rtol=1e-5)
    np.testing.assert_array_equal(seen["sigma"], SIGMA)


def test_sampling_with_the_exact_gaussian_network_gives_the_data_distribution():
    """Data N(0.3, 0.5^2): the best F is linear; the sampler must return that mean and spread."""

    def network(params, x, t, cond):
        sigma = jnp.exp(4.0 * t)[:, None, None, None]
        root = jnp.sqrt(sigma**2 + 0.25)
        # E[x0 | x] = 0.3 + 0.25 / (sigma^2 + 0.25) (x - 0.3), solved for F
        return (0.3 - 0.25 / root**2 * 0.3) * root / (0.5 * sigma) + 0.0 * x

    x = jax.random.normal(jax.random.key(3), (64, 8, 8, 1))
    table = solvers.dpmpp(schedule.edm(), 40)
    out = np.asarray(sampling.sample(edm.precondition(network), {}, x, {}, table))
    assert out.mean() == pytest.approx(0.3 + 0.5 * float(x.mean()), abs=0.01)
    assert out.std() == pytest.approx(0.5 * float(x.std()), abs=0.01)


def test_augmentation_replaces_picture_and_level_together():
    cond = {"low_res": X0, "low_res_noise": jnp.full(5, 9.0), "text": SIGMA}
    level = jnp.array([0.0, 0.1, 0.2, 0.3, 0.4])
    out = edm.augment_low_res(cond, level, NOISE)
    spread = (out["low_res"] - X0).std((1, 2, 3))
    np.testing.assert_allclose(spread, level, atol=0.02)
    np.testing.assert_array_equal(out["low_res_noise"], level)
    assert out["text"] is SIGMA

"""Noise schedules and prediction types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.diffusion import prediction, schedule
from cnxs_jax.errors import ConfigError

LINEAR = schedule.linear()
T = jnp.array([0, 7, 259, 999])


def test_abar_of_pixart():
    abar = LINEAR.alphas_cumprod[[999, 759, 499, 259, 19]]
    expected = [4.03583e-5, 2.87678e-3, 7.85872e-2, 0.497614, 0.994231]
    np.testing.assert_allclose(abar, expected, rtol=1e-5)


def test_first_steps_are_noisy():
    """In bfloat16 the first ten values of abar are 1 and the SNR infinite."""
    assert np.all(np.asarray(LINEAR.sigma(jnp.arange(10))) >= 0.0099)
    assert len(np.unique(LINEAR.alphas_cumprod.astype(np.float32))) == 1000


@pytest.mark.parametrize("made", [LINEAR, schedule.scaled_linear(), schedule.cosine()])
def test_variance_is_preserved(made):
    alpha, sigma = made.alpha(T), made.sigma(T)
    assert alpha.dtype == sigma.dtype == jnp.float32
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=3e-7)
    np.testing.assert_allclose(made.snr(T), (alpha / sigma) ** 2, rtol=1e-5)
    again = schedule.from_config(schedule.to_config(made))
    np.testing.assert_array_equal(again.betas, made.betas)


def test_lcm_has_its_own_default():
    read = schedule.from_config({"_class_name": "LCMScheduler"})
    np.testing.assert_array_equal(read.betas, schedule.scaled_linear().betas)
    read = schedule.from_config({"_class_name": "DDIMScheduler"})
    np.testing.assert_array_equal(read.betas, LINEAR.betas)


def test_given_betas_and_abar_are_kept():
    read = schedule.from_config({"trained_betas": [0.1, 0.2]})
    np.testing.assert_allclose(read.alphas_cumprod, [0.9, 0.72])
    again = schedule.from_alphas_cumprod(LINEAR.alphas_cumprod)
    np.testing.assert_allclose(again.betas, LINEAR.betas, rtol=1e-10)


@pytest.mark.parametrize("t", [-1, 1000, np.array([3, 1000])])
def test_times_off_the_schedule_are_refused(t):
    """JAX would clamp the index and train at the wrong noise in silence."""
    with pytest.raises(ConfigError, match="1000"):
        LINEAR.alpha(t)


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedule.linear(0.02, 1e-4),
        lambda: schedule.linear(num_steps=0),
        lambda: schedule.edm(80.0, 0.002),
        lambda: schedule.from_betas([0.1, 1.0]),
        lambda: schedule.from_alphas_cumprod([0.5, 0.6]),
        lambda: schedule.from_config({"beta_schedule": "lineer"}),
        lambda: schedule.to_config(schedule.edm()),
        lambda: schedule.edm().sigma(-1.0),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_add_noise():
    x0, noise = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 2))
    noised = schedule.add_noise(LINEAR, x0, noise, T)
    np.testing.assert_allclose(noised[-1], noise[-1], atol=0.03)  # abar(999) = 4e-5
    np.testing.assert_allclose(noised[0], x0[0], atol=0.05)
    levels = jnp.array([0.0, 1.0, 2.0, 80.0])
    edm = schedule.add_noise(schedule.edm(), x0, noise, levels)
    np.testing.assert_array_equal(edm[0], x0[0])
    np.testing.assert_allclose(edm[2], x0[2] + 2 * noise[2], rtol=1e-6)


@pytest.mark.parametrize("kind", schedule.PREDICTIONS)
def test_a_perfect_network_gives_back_data_and_noise(kind):
    x0, noise = jax.random.normal(jax.random.key(1), (2, 4, 3, 3, 2))
    x = schedule.add_noise(LINEAR, x0, noise, T)
    out = prediction.target(LINEAR, x0, noise, T, kind)
    out = jnp.concatenate([out, 9.0 + out], axis=-1)  # a learned range behind it
    got_x0 = prediction.to_x0(LINEAR, x, out, T, kind)
    got_eps = prediction.to_eps(LINEAR, x, out, T, kind)
    # abar(999) = 4e-5 multiplies float32 rounding by 157, sigma(0) = 0.01 by 100.
    np.testing.assert_allclose(got_x0, x0, atol=6e-5)
    np.testing.assert_allclose(got_eps, noise, atol=6e-5)
    np.testing.assert_array_equal(prediction.variance_channels(out, x), out[..., 2:])
    assert prediction.variance_channels(x, x) is None


def test_min_snr_weights():
    """Below the cap the x0 weight is the SNR, so the epsilon weight is 1; above, gamma / snr."""
    snr = np.asarray(LINEAR.snr(T))
    weight = schedule.min_snr_weight(LINEAR, T, "epsilon", gamma=5.0)
    assert weight[3] == 1.0
    assert snr[0] > 5.0
    np.testing.assert_allclose(weight[0], 5.0 / snr[0], rtol=1e-6)
    # One x0 loss, three parameterisations: an error of 1 in v is sigma in x0 and alpha in eps.
    sigma, alpha = np.asarray(LINEAR.sigma(T)), np.asarray(LINEAR.alpha(T))
    in_x0 = np.asarray(schedule.min_snr_weight(LINEAR, T, "sample"))
    in_v = np.asarray(schedule.min_snr_weight(LINEAR, T, "v_prediction"))
    np.testing.assert_allclose(in_v, in_x0 * sigma**2, rtol=1e-4)
    np.testing.assert_allclose(weight, in_x0 * (sigma / alpha) ** 2, rtol=1e-4)
    with pytest.raises(ConfigError, match="epsilon"):
        schedule.min_snr_weight(LINEAR, T, "epsilom")


def test_boundary_is_exact():
    c_skip, c_out = prediction.boundary_scalings(jnp.array([0, 1, 19, 999]))
    assert (c_skip[0], c_out[0]) == (1.0, 0.0)
    np.testing.assert_allclose(c_skip[2], 6.925e-6, rtol=1e-4)
    np.testing.assert_allclose(c_out[1], 0.99875, rtol=1e-5)
    x, x0 = jax.random.normal(jax.random.key(2), (2, 4, 3, 3, 2))
    np.testing.assert_array_equal(prediction.apply_boundary(x, x0, jnp.zeros(4, jnp.int32)), x)


def test_boundary_survives_half_precision_times():
    """(10 t)^2 overflows float16 from t = 26 on, which would make the output zero."""
    c_skip, c_out = prediction.boundary_scalings(jnp.array([26, 999], jnp.float16))
    assert c_out.dtype == jnp.float32
    np.testing.assert_allclose(c_out, 1.0, rtol=1e-5)
    assert np.all(np.asarray(c_skip) > 0)


def test_what_a_class_leaves_to_its_defaults_is_written_out():
    """LCMScheduler's defaults are not the other schedulers'."""
    lcm = {"_class_name": "LCMScheduler", "prediction_type": "v_prediction"}
    assert schedule.model_fields(lcm) == {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
    }
    ddim = schedule.model_fields({"_class_name": "DDIMScheduler"})
    assert (ddim["beta_start"], ddim["beta_end"], ddim["beta_schedule"]) == (1e-4, 0.02, "linear")

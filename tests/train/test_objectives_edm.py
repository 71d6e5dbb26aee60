"""The EDM objective: zero for the oracle, levels of the interval, dropout, noise augmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.diffusion import edm, schedule
from cnxs_jax.diffusion.expert_tree import LogNormal, Times, node
from cnxs_jax.errors import ConfigError
from train import objectives
from train.objectives_edm import drop_encoders, edm_denoise

N = 64
X = 0.5 * jax.random.normal(jax.random.key(1), (N, 4, 4, 3))
KEY = jax.random.key(2)
KEYS = jax.random.split(KEY, 2000)


def oracle(params, x, t, cond):
    """The network that knows x0."""
    sigma = cond["sigma"]
    root = jnp.sqrt(sigma**2 + 0.25)[:, None, None, None]
    noise = (x * root - X) / sigma[:, None, None, None]
    return edm.network_target(X, noise, sigma)


def spying(seen):
    def network(params, x, t, cond):
        seen.update(cond, t=t, x=x)
        return jnp.zeros_like(x) + params.get("bias", 0.0)

    return network


def test_the_oracle_has_no_loss_and_an_error_of_the_network_costs_its_square():
    loss, _ = edm_denoise(oracle)({}, {}, {}, {"x": X, "cond": {}}, KEY)
    assert float(loss) < 1e-6
    off = edm_denoise(lambda *args: oracle(*args) + 0.5)
    loss, _ = off({}, {}, {}, {"x": X, "cond": {}}, KEY)
    assert float(loss) == pytest.approx(0.25, rel=1e-3)


def test_the_loss_is_the_weighted_error_of_the_denoised_picture():
    seen = {}
    objective = edm_denoise(spying(seen), interval=(0.5, 1.0))
    loss, metrics = objective({}, {}, {}, {"x": X, "cond": {}}, KEY)
    sigma = seen["sigma"]
    x = seen["x"] / edm.scalings(sigma).input[:, None, None, None]
    denoised = edm.precondition(spying({}))({}, x, sigma, {})
    error = jnp.square(denoised - X).mean((1, 2, 3))
    assert float(loss) == pytest.approx(float((edm.loss_weight(sigma) * error).mean()), rel=1e-4)
    assert float(metrics["mse"]) == pytest.approx(float(error.mean()), rel=1e-4)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_levels_come_from_the_interval(side_by_side):
    """From a static interval, or from the one that a stacked expert holds in `frozen`."""
    expert, seen, levels = node(4, 15), {}, LogNormal(scale=4.0)
    interval = (expert.low, expert.high)
    objective = edm_denoise(spying(seen), levels, interval=None if side_by_side else interval)
    objective({}, {}, {"interval": jnp.array(interval)}, {"x": X, "cond": {}}, KEY)
    quantile = levels.quantile(seen["sigma"])
    assert quantile.min() >= 15 / 16 - 1e-6
    assert len(np.unique(quantile)) == N
    np.testing.assert_allclose(jnp.exp(4 * seen["t"]), seen["sigma"], rtol=1e-5)


def test_examples_keep_their_draws_when_the_batch_is_cut():
    seen, half = {}, {}
    keys = jax.random.split(KEY, N)
    edm_denoise(spying(seen))({}, {}, {}, {"x": X, "cond": {}}, keys)
    edm_denoise(spying(half))({}, {}, {}, {"x": X[N // 2 :], "cond": {}}, keys[N // 2 :])
    np.testing.assert_array_equal(seen["x"][N // 2 :], half["x"])


def test_encoders_are_dropped_independently_at_their_rates():
    masks = {
        "text_mask": jnp.ones((2000, 3), jnp.int32),
        "clip_text_mask": jnp.ones((2000, 2), jnp.int32),
        "clip_image_mask": jnp.ones((2000,), jnp.int32),
    }
    rates = {"text": 0.25, "clip_text": 0.5, "clip_image": 0.9}
    out = drop_encoders(masks, rates, KEYS)
    assert np.all(out["text_mask"] == out["text_mask"][:, :1])  # whole encoders
    text, clip, image = (1 - np.asarray(out[f"{n}_mask"]).reshape(2000, -1)[:, 0] for n in rates)
    np.testing.assert_allclose(
        [text.mean(), clip.mean(), image.mean()], [0.25, 0.5, 0.9], atol=0.04
    )
    np.testing.assert_allclose(np.corrcoef([text, clip, image]), np.eye(3), atol=0.08)
    kept = drop_encoders(masks, {"text": 0.0, "clip_image": 1.0}, KEYS)
    assert np.all(kept["text_mask"] == 1)
    assert not np.any(kept["clip_image_mask"])
    assert kept["clip_text_mask"] is masks["clip_text_mask"]


def test_the_network_reads_the_noised_picture_and_its_level():
    seen, low = {}, jnp.zeros((N, 32, 32, 3))
    objective = edm_denoise(spying(seen), max_low_res_noise=0.5)
    objective({}, {}, {}, {"x": X, "cond": {"low_res": low}}, KEY)
    level = np.asarray(seen["low_res_noise"])
    assert 0 <= level.min() < 0.1
    assert 0.4 < level.max() <= 0.5
    np.testing.assert_allclose(seen["low_res"].std((1, 2, 3)), level, rtol=0.1)


def test_gradients_reach_the_parameters_and_noises_multiply_the_batch():
    seen = {}
    objective = edm_denoise(spying(seen), noises=3)
    grads = jax.grad(lambda p: objective(p, {}, {}, {"x": X, "cond": {}}, KEY)[0])(
        {"bias": jnp.float32(1.0)}
    )
    assert float(grads["bias"]) == pytest.approx(2.0, abs=0.3)  # the target's mean is 0
    assert seen["sigma"].shape == (3 * N,)


def test_mistakes_are_refused():
    with pytest.raises(ConfigError, match="t5"):
        edm_denoise(oracle, dropout={"t5": 0.1})
    with pytest.raises(ConfigError, match="share"):
        edm_denoise(oracle, dropout={"text": 1.5})
    objective = edm_denoise(oracle, dropout={"text": 0.5})
    with pytest.raises(ConfigError, match="text_mask"):
        objective({}, {}, {}, {"x": X, "cond": {}}, KEY)
    with pytest.raises(ConfigError, match="low_res"):
        edm_denoise(oracle, max_low_res_noise=0.1)({}, {}, {}, {"x": X, "cond": {}}, KEY)


def test_discrete_experts_draw_their_truncated_times():
    """The other objective takes any distribution of times; an expert's is a truncated one."""
    times, seen = Times(1000, logit_normal=(0.5, 1.0)), []

    def network(params, x, t, cond):
        seen.append(np.asarray(t))
        return x

    objective = objectives.denoise(
        network, schedule.linear(), draw_time=lambda key: times.draw(key, 0.75, 1.0)
    )
    objective({}, {}, {}, {"x": X, "cond": {}}, KEY)
    first, end = times.limits(0.75, 1.0)
    assert first <= seen[0].min()
    assert seen[0].max() < end == 1000
    # logit-normal: the density falls towards the end, unlike the uniform one's
    assert np.mean(seen[0] < (first + end) / 2) > 0.55

"""Objectives: what they are zero for, where their gradients go, which timesteps they draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import lora
from cnxs_jax.diffusion import prediction as predictions
from cnxs_jax.diffusion import schedule
from cnxs_jax.diffusion.expert_tree import Times
from cnxs_jax.errors import ConfigError
from train import objectives

LINEAR = schedule.linear()
X = jax.random.normal(jax.random.key(1), (64, 4, 4, 2)) * 0.5
BATCH = {"x": X, "cond": {}}
KEY = jax.random.key(2)


def oracle(prediction, learned=0.0, error=0.0):
    """The network that knows x0; `learned` fills the variance channels."""

    def denoise(params, x_t, t, cond):
        alpha = schedule.expand(LINEAR.alpha(t), X)
        sigma = schedule.expand(LINEAR.sigma(t), X)
        noise = (x_t - alpha * X) / sigma
        out = predictions.target(LINEAR, X, noise, t, prediction) + error
        return jnp.concatenate([out, jnp.full_like(out, learned)], axis=-1)

    return denoise


@pytest.mark.parametrize("prediction", schedule.PREDICTIONS)
def test_perfect_network_has_no_loss(prediction):
    loss, _ = objectives.denoise(oracle(prediction), LINEAR, prediction=prediction)(
        {}, {}, {}, BATCH, KEY
    )
    assert float(loss) < 1e-9


@pytest.mark.parametrize("prediction", schedule.PREDICTIONS)
def test_min_snr_weighs_the_same_x0_error_alike(prediction):
    """An error in x0 costs min(SNR, 5) times its square, whatever the network predicts."""

    def off_by_one(params, x_t, t, cond):
        alpha, sigma = (schedule.expand(f(t), X) for f in (LINEAR.alpha, LINEAR.sigma))
        x0 = X + 1.0
        return predictions.target(LINEAR, x0, (x_t - alpha * x0) / sigma, t, prediction)

    seen = []

    def spy(params, x_t, t, cond):
        seen.append(t)
        return off_by_one(params, x_t, t, cond)

    loss, _ = objectives.denoise(spy, LINEAR, prediction=prediction, loss_weighting="min_snr")(
        {}, {}, {}, BATCH, KEY
    )
    abar = LINEAR.alphas_cumprod[np.asarray(seen[0])]
    assert float(loss) == pytest.approx(np.minimum(abar / (1 - abar), 5).mean(), rel=2e-3)


def test_bound_is_zero_at_the_true_variance_and_positive_elsewhere():
    """With the true mean, raw -1 is the posterior's own variance: KL 0 (t > 0)."""

    def bound(learned):
        objective = objectives.denoise(
            oracle("epsilon", learned), LINEAR, learned_range=True, t_range=(1, 1000)
        )
        return float(objective({}, {}, {}, BATCH, KEY)[1]["vb"])

    assert abs(bound(-1.0)) < 1e-6
    assert bound(1.0) > 1e-5


def test_bound_moves_the_variance_and_not_the_mean():
    def loss(params, learned_range):
        def network(p, x_t, t, cond):
            return oracle("epsilon")(p, x_t, t, cond) + jnp.concatenate(
                [jnp.full_like(X, 1.0) * p["mean"], jnp.full_like(X, 1.0) * p["var"]], axis=-1
            )

        # early on beta and beta-tilde differ, so that the variance has something to choose
        objective = objectives.denoise(
            network, LINEAR, learned_range=learned_range, t_range=(0, 10)
        )
        return objective(params, {}, {}, BATCH, KEY)[0]

    params = {"mean": jnp.float32(0.1), "var": jnp.float32(0.2)}
    with_bound, without = (jax.grad(loss)(params, flag) for flag in (True, False))
    assert float(with_bound["mean"]) == pytest.approx(float(without["mean"]), rel=1e-6)
    assert float(without["var"]) == 0.0
    assert abs(float(with_bound["var"])) > 1e-4


def test_timesteps_stay_in_their_range_and_fill_it():
    seen = []

    def spy(params, x_t, t, cond):
        seen.append(np.asarray(t))
        return x_t

    objective = objectives.denoise(spy, LINEAR, t_range=(100, 110))
    for i in range(5):
        objective({}, {}, {}, BATCH, jax.random.key(i))
    assert set(np.concatenate(seen)) == set(range(100, 110))


def test_draws_do_not_depend_on_the_batch():
    keys = jax.random.split(KEY, 8)
    t, noise = objectives.draw(keys, X[:8], Times(1000).draw)
    t_half, noise_half = objectives.draw(keys[4:], X[4:8], Times(1000).draw)
    np.testing.assert_array_equal(t[4:], t_half)
    np.testing.assert_array_equal(noise[4:], noise_half)
    assert len(set(np.asarray(t))) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"prediction": "eps"},
        {"loss_weighting": "minsnr"},
        {"t_range": (0, 1001)},
        {"t_range": (5, 5)},
        {"t_range": (-1, 5)},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError):
        objectives.denoise(oracle("epsilon"), LINEAR, **options)


def test_consistency_needs_null_and_a_dividing_grid():
    with pytest.raises(ConfigError, match="unconditional"):
        objectives.consistency(oracle("epsilon"), oracle("epsilon"), LINEAR)(
            {}, {}, {"teacher": {}}, BATCH, KEY
        )
    with pytest.raises(ConfigError):
        objectives.consistency(oracle("epsilon"), oracle("epsilon"), LINEAR, num_ddim_steps=2000)


def test_an_adapters_target_is_its_own_average():
    """As if merged weights were distilled: the EMA adapter on the teacher makes the target."""

    def network(params, x, t, cond):
        return x @ params["linear"]["kernel"] + cond["shift"][:, None, None]

    kernel = jax.random.normal(jax.random.key(3), (2, 2)) * 0.5
    teacher = {"linear": {"kernel": kernel}}
    shift = jnp.linspace(0.0, 0.2, 64)[:, None]
    batch = {"x": X, "cond": {"shift": shift, "null": {"shift": -shift}}}
    fresh = lora.init(teacher, ".*", 1, jax.random.key(4))["linear"]
    ours, average = ({"linear": {**fresh, "lora_B": jnp.full((1, 2), b)}} for b in (0.4, -0.3))

    def loss(resolve, params, ema):
        objective = objectives.consistency(network, network, LINEAR, resolve)
        return float(objective(params, ema, {"teacher": teacher}, batch, KEY)[0])

    merged, mean = (lora.merge(teacher, tree) for tree in (ours, average))
    found = loss(objectives.with_lora, ours, average)
    assert found == pytest.approx(loss(objectives.identity, merged, mean), rel=1e-6)
    assert abs(found - loss(objectives.with_lora, ours, ours)) > 1e-3


def test_autoencoder_edges_see_what_l1_does_not():
    """A constant offset has no edges; a checkerboard of the same size has."""

    def loss(pattern, edge):
        objective = objectives.autoencode(
            lambda p, x: (jnp.zeros((64, 1, 1, 1)), jnp.zeros((64, 1, 1, 1))),
            lambda p, z: X + pattern,
            l2=0.0,
            kl=0.0,
            edge=edge,
        )
        return float(objective({}, {}, {}, BATCH, KEY)[0])

    checker = jnp.asarray(np.indices((4, 4)).sum(0) % 2 * 2.0 - 1.0)[None, :, :, None]
    assert loss(jnp.ones((1, 1, 1, 1)), 1.0) == pytest.approx(1.0, abs=1e-5)
    assert loss(checker, 0.0) == pytest.approx(1.0, abs=1e-5)
    assert loss(checker, 1.0) == pytest.approx(5.0, abs=1e-4)


def drawn(**options):
    """The timesteps of many draws."""
    seen = []

    def spy(params, x_t, t, cond):
        seen.append((t, x_t, cond["n"]))
        return x_t

    x = jnp.zeros((512, 1, 1, 1))
    batch = {"x": x, "cond": {"n": jnp.arange(512)}}
    objectives.denoise(spy, LINEAR, **options)({}, {}, {}, batch, KEY)
    return [np.asarray(a) for a in seen[0]]


def test_logit_normal_timesteps_have_its_quantiles():
    """The median is low + (high - low) * sigmoid(mean); one sd is one logit."""
    t, _, _ = drawn(logit_normal=(-0.5, 1.0), t_range=(200, 1000), noises=8)
    part = (np.sort(t) - 200 + 0.5) / 800
    logits = np.log(part / (1 - part))
    assert t.min() >= 200
    assert t.max() < 1000
    assert np.median(logits) == pytest.approx(-0.5, abs=0.06)
    spread = np.quantile(logits, 0.841) - np.quantile(logits, 0.159)
    assert spread == pytest.approx(2.0, abs=0.12)


def test_a_spread_of_zero_is_refused():
    with pytest.raises(ConfigError, match="not above 0"):
        objectives.denoise(oracle("epsilon"), LINEAR, logit_normal=(0.0, 0.0))


def test_each_example_gets_several_noises_of_its_own():
    t, x_t, n = drawn(noises=3)
    assert n.tolist() == np.repeat(np.arange(512), 3).tolist()
    assert len(np.unique(x_t)) == 3 * 512
    assert (t.reshape(512, 3).std(axis=1) > 0).mean() > 0.99

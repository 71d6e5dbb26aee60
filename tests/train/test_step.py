"""The train step: accumulation, EMA, non-finite steps, frozen leaves, lowering for TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnxs_jax.diffusion import schedule
from tests.train import toy
from train import objectives, optimizer
from train.step import TrainState, init_state, make_step

KEY = jax.random.key(3)


def batch(size=32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((size, 4, 4, 2)).astype(np.float32),
        "cond": {"hint": rng.standard_normal((size, 4)).astype(np.float32)},
    }


def toy_step(tx=None, **options):
    objective = objectives.denoise(toy.denoise, schedule.linear())
    return make_step(objective, tx or optax.sgd(0.1), **{"ema_decay": 0.9, **options})


def run_steps(step, state, number, frozen=None):
    losses = []
    for i in range(number):
        state, metrics = step(state, frozen or {}, batch(seed=i), KEY)
        losses.append(float(metrics["loss"]))
    return state, losses


def test_four_micro_batches_equal_one_batch():
    state = init_state(toy.init(KEY), optax.sgd(0.1))
    one, metrics = jax.jit(toy_step())(state, {}, batch(), KEY)
    four, metrics_4 = jax.jit(toy_step(grad_accum=4))(state, {}, batch(), KEY)
    assert float(metrics_4["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-6)
    assert float(metrics_4["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, four)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one.params, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def quadratic(params, ema, frozen, batch, keys):
    loss = jnp.mean(jnp.square(params["w"] - batch["x"]))
    return loss, {}


def test_ema_after_two_steps_by_hand():
    """w: 1 -> 0.5 -> 0.25 (gradient 2w, rate 1/4); ema: 1 -> .9 + .05 = .95 -> .855 + .025."""
    tx = optax.sgd(0.25)
    step = make_step(quadratic, tx, 0.9)
    state = init_state({"w": jnp.ones(())}, tx)
    for _ in range(2):
        state, _ = step(state, {}, {"x": jnp.zeros((1,))}, KEY)
    assert float(state.params["w"]) == 0.25
    assert float(state.ema["w"]) == pytest.approx(0.88, abs=1e-7)
    assert int(state.step) == 2


def test_ema_warm_up_forgets_the_start():
    """Decay 1/10 at step 0: ema = 0.1 * 1 + 0.9 * 0.5."""
    tx = optax.sgd(0.25)
    step = make_step(quadratic, tx, 0.9, ema_warmup=True)
    state, _ = step(init_state({"w": jnp.ones(())}, tx), {}, {"x": jnp.zeros((1,))}, KEY)
    assert float(state.ema["w"]) == pytest.approx(0.55, abs=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_step_changes_nothing(bad):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    step = jax.jit(toy_step(tx))
    state = init_state(toy.init(KEY), tx)
    broken = batch()
    broken["x"][3, 1, 2, 0] = bad
    after, metrics = step(state, {}, broken, KEY)
    assert not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, after, state)
    after, metrics = step(state, {}, batch(), KEY)
    assert metrics["finite"]
    assert int(after.step) == 1


def test_frozen_leaves_get_no_gradient_and_no_moments():
    """`freeze` leaves the pattern's parameters out of the state; the step reads them as given."""
    params = toy.init(KEY)
    trainable, rest = optimizer.freeze(params, (r"ff/net_0/.*",))
    assert set(rest["ff"]) == {"net_0"}
    tx = optax.adam(1e-2)
    state = init_state(trainable, tx)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len([x for x in jax.tree.leaves(trainable) if x.ndim])
    objective = objectives.denoise(toy.denoise, schedule.linear(), objectives.with_frozen)
    step = jax.jit(make_step(objective, tx, 0.9), donate_argnums=0)
    frozen = {"rest": jax.tree.map(jnp.array, rest)}
    before = jax.device_get(frozen)
    state, losses = run_steps(step, state, 5, frozen)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
    assert losses[-1] < losses[0]
    changed = objective(state.params, {}, jax.tree.map(lambda x: x + 1, frozen), batch(), KEY)
    assert float(changed[0]) != pytest.approx(
        float(objective(state.params, {}, frozen, batch(), KEY)[0]), rel=1e-3
    )


def test_lowers_for_tpu():
    tx = optax.adamw(1e-2)
    state = jax.eval_shape(lambda: init_state(toy.init(KEY), tx))
    lowered = (
        jax.jit(toy_step(tx, grad_accum=2), donate_argnums=0)
        .trace(state, {}, batch(), KEY)
        .lower(lowering_platforms=("tpu",))
    )
    assert "while" in lowered.as_text()  # the micro-batches are a loop, not copies


def test_state_is_a_pytree_of_arrays():
    state = init_state(toy.init(KEY), optax.adam(1e-3))
    assert isinstance(state, TrainState)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    copies = {id(x) for x in jax.tree.leaves(state.ema)}
    assert not copies & {id(x) for x in jax.tree.leaves(state.params)}  # or donation would fail

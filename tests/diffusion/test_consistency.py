"""The pieces of latent consistency distillation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.diffusion import consistency, schedule
from cnxs_jax.diffusion.prediction import to_eps, to_x0
from cnxs_jax.errors import ConfigError

LINEAR = schedule.linear()
GRID = consistency.skip_grid(LINEAR)
SHAPE = (4, 3, 3, 2)
X0, NOISE = jax.random.normal(jax.random.key(0), (2, *SHAPE))
INDEX = jnp.array([0, 1, 24, 49])
COND = {"shift": jnp.array([0.1, 0.2, 0.3, 0.4]), "null": {"shift": jnp.zeros(4)}}


def network(params, x, t, cond):
    out = jnp.tanh(x * params["w"] + jnp.cos(t / 200.0)[:, None, None, None])
    out = out + cond["shift"][:, None, None, None]
    return jnp.concatenate([out, 9.0 * out], axis=-1)


def tree(w):
    return {"w": jnp.float32(w)}


def test_grid_of_pixart():
    assert GRID.t.tolist() == list(range(19, 1000, 20))
    assert GRID.s.tolist() == [0, *range(19, 980, 20)]
    with pytest.raises(ConfigError):
        consistency.skip_grid(LINEAR, 1001)
    with pytest.raises(ConfigError):
        consistency.skip_grid(schedule.edm())


@pytest.mark.parametrize("kind", schedule.PREDICTIONS)
def test_consistency_function_is_the_identity_at_time_zero(kind):
    out = consistency.consistency_fn(
        network, LINEAR, tree(0.7), X0, jnp.zeros(4, jnp.int32), COND, kind
    )
    np.testing.assert_array_equal(out, X0)


@pytest.mark.parametrize("kind", schedule.PREDICTIONS)
def test_teacher_step_guides_x0_and_noise(kind):
    """Combining x0 and noise, each in the (1 + omega) form, as the reference script does."""
    omega, t, s = 4.5, jnp.asarray(GRID.t)[INDEX], jnp.asarray(GRID.s)[INDEX]
    x = schedule.add_noise(LINEAR, X0, NOISE, t)
    got = consistency.teacher_step(network, LINEAR, tree(0.7), x, t, s, COND, omega, kind)
    halves = [network(tree(0.7), x, t, c) for c in (COND, COND["null"])]
    mixed = []
    for convert in (to_x0, to_eps):
        full, empty = (convert(LINEAR, x, out, t, kind) for out in halves)
        mixed.append((1 + omega) * full - omega * empty)
    want = consistency.ddim_step(LINEAR, *mixed, s)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def test_ddim_step_of_the_truth_stays_on_the_trajectory():
    s = jnp.array([0, 19, 479, 979])
    got = consistency.ddim_step(LINEAR, X0, NOISE, s)
    np.testing.assert_array_equal(got, schedule.add_noise(LINEAR, X0, NOISE, s))


def pair(params, ema, frozen, cond=COND):
    return consistency.lcd_pair(
        *(network, network, LINEAR, (params, ema, frozen), X0, NOISE, INDEX, cond, GRID)
    )


def test_gradient_flows_into_the_student_alone():
    def loss(trees):
        return jnp.mean(consistency.pseudo_huber(*pair(*trees)))

    student, ema, teacher = jax.grad(loss)((tree(0.7), tree(0.6), tree(0.5)))
    assert abs(student["w"]) > 1e-3
    assert (ema["w"], teacher["w"]) == (0.0, 0.0)


def test_the_target_is_the_ema_model_at_the_earlier_time():
    predicted, target = pair(tree(0.7), tree(0.6), tree(0.5))
    # Index 0 ends at time 0, where the target is the teacher's step itself.
    t, s = jnp.asarray(GRID.t)[INDEX], jnp.asarray(GRID.s)[INDEX]
    x_t = schedule.add_noise(LINEAR, X0, NOISE, t)
    x_s = consistency.teacher_step(network, LINEAR, tree(0.5), x_t, t, s, COND, 4.5)
    np.testing.assert_allclose(target[0], x_s[0], rtol=1e-6)
    moved = [pair(tree(0.7), *trees) for trees in ((tree(0.9), tree(0.5)), (tree(0.6), tree(0.9)))]
    for other_prediction, other_target in moved:
        np.testing.assert_array_equal(other_prediction, predicted)
        assert np.abs(other_target - target).max() > 1e-3


def test_the_student_never_sees_the_null_condition():
    changed = COND | {"null": {"shift": jnp.full(4, 0.9)}}
    plain, other = (pair(tree(0.7), tree(0.6), tree(0.5), c) for c in (COND, changed))
    np.testing.assert_array_equal(plain[0], other[0])
    assert np.abs(plain[1] - other[1]).max() > 1e-3


def test_pseudo_huber_is_square_then_absolute():
    zero = jnp.zeros((2, 1, 1, 1))
    small = consistency.pseudo_huber(jnp.array([1e-4, 2e-4]).reshape(2, 1, 1, 1), zero, 1e-2)
    np.testing.assert_allclose(small[1] / small[0], 4.0, rtol=1e-2)
    large = consistency.pseudo_huber(jnp.array([1.0, 2.0]).reshape(2, 1, 1, 1), zero)
    np.testing.assert_allclose(large, [0.999, 1.999], rtol=1e-6)
    assert consistency.pseudo_huber(zero, zero).tolist() == [0.0, 0.0]

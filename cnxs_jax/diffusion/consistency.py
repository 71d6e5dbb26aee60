"""Latent consistency distillation (LCM, arXiv 2310.04378; PixArt-delta, 2401.05252), in pieces.

A student f(x, t) learns to give the same x0 along a trajectory of the guided teacher: from time t
the teacher takes one DDIM step of length k to time s, and f(x_t, t) is drawn towards the EMA
student's f(x_s, s). Training objectives put these together; nothing here holds state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.diffusion import guidance
from cnxs_jax.diffusion.grids import check_steps
from cnxs_jax.diffusion.prediction import apply_boundary, to_eps, to_x0
from cnxs_jax.diffusion.schedule import add_noise, expand
from cnxs_jax.errors import ConfigError


class SkipGrid(NamedTuple):
    """int32 `[N]`: the times `t` that are distilled and, k before each, `s` (0 for the first)."""

    t: np.ndarray
    s: np.ndarray


def skip_grid(schedule, num_steps=50):
    """The grid of N times with k = num_train_timesteps // N: t = k - 1, 2k - 1, ..., s = t - k.

    The first `s` would be -1 and is 0, with abar[0]: the boundary, where f(x, 0) = x.
    """
    if schedule.kind != "discrete":
        raise ConfigError("distillation needs a discrete schedule", "skip_grid")
    check_steps(num_steps, schedule.num_train_timesteps)
    k = schedule.num_train_timesteps // num_steps
    t = np.arange(1, num_steps + 1) * k - 1
    return SkipGrid(t.astype(np.int32), np.maximum(t - k, 0).astype(np.int32))


def ddim_step(schedule, x0, eps, s):
    """Deterministic DDIM to time `s [B]`: `alpha(s) x0 + sigma(s) eps`, float32."""
    return expand(schedule.alpha(s), x0) * x0 + expand(schedule.sigma(s), x0) * eps


def consistency_fn(denoise, schedule, params, x, t, cond, prediction="epsilon", **scalings):
    """`f(x, t) = c_skip x + c_out x0(x, t)`, float32 of x's shape; no clipping of x0.

    `scalings` are `sigma_data` and `timestep_scaling` of `boundary_scalings`.
    """
    out = denoise(params, x, t, cond)
    x0 = to_x0(schedule, x, out, t, prediction)
    return apply_boundary(x, x0, t, **scalings)


def teacher_step(denoise, schedule, params, x, t, s, cond, omega, prediction="epsilon"):
    """One DDIM step of the guided teacher from `t` to `s` (all `[B]`), float32 of x's shape.

    Guidance is `(1 + omega) cond - omega null` with `cond["null"]`. It is applied to the output
    once: x0 and eps are affine in it with weights that sum to one, so both come out guided.
    """
    scale = jnp.broadcast_to(jnp.asarray(guidance.scale_of_omega(omega), jnp.float32), t.shape)
    out = guidance.cfg(denoise)(params, x, t, {**cond, "guidance_scale": scale})
    x0 = to_x0(schedule, x, out, t, prediction)
    eps = to_eps(schedule, x, out, t, prediction)
    return ddim_step(schedule, x0, eps, s)


def lcd_pair(
    student,
    teacher,
    schedule,
    trees,
    x0,
    noise,
    index,
    cond,
    grid,
    omega=4.5,
    prediction="epsilon",
    **scalings,
):
    """Prediction and target of one distillation step, PixArt-delta's algorithm 1.

    Args:
        student, teacher: denoisers.
        trees: `(student params, target (EMA) params, teacher params)`.
        x0, noise: `[B, H, W, C]`.
        index: int `[B]` into `grid`, a `SkipGrid`.
        cond: with `null`, which only the teacher sees. `guidance` is passed on to the student.

    Returns:
        `(prediction, target)`, float32 of x0's shape; no gradient flows into the target.
    """
    params, ema, frozen = trees
    t, s = jnp.asarray(grid.t)[index], jnp.asarray(grid.s)[index]
    x_t = add_noise(schedule, x0, noise, t)
    plain = {k: v for k, v in cond.items() if k != "null"}
    predicted = consistency_fn(student, schedule, params, x_t, t, plain, prediction, **scalings)
    x_s = teacher_step(teacher, schedule, frozen, x_t, t, s, cond, omega, prediction)
    x_s = jax.lax.stop_gradient(x_s)
    aim = consistency_fn(student, schedule, ema, x_s, s, plain, prediction, **scalings)
    return predicted, jax.lax.stop_gradient(aim)


def pseudo_huber(prediction, target, c=1e-3):
    """Mean over each image of `sqrt(d^2 + c^2) - c`, float32 `[B]` (PixArt-delta: c = 0.001)."""
    d = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.sqrt(d**2 + c**2) - c, axis=tuple(range(1, d.ndim)))

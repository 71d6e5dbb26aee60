"""PLMS, the scheduler that Stable Diffusion 1 ships with: PNDM without its Runge-Kutta start."""

import numpy as np

from cnxs_jax.diffusion import grids
from cnxs_jax.diffusion.table import build
from cnxs_jax.errors import ConfigError

# Adams-Bashforth weights of the newest and earlier evaluations; what the repeated second row gave
# is stepped over while the history fills up.
_FIRST = (
    (3 / 2, 0, -1 / 2),
    (23 / 12, -16 / 12, 0, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, 0, -9 / 24),
)
_WEIGHTS = (55 / 24, -59 / 24, 37 / 24, -9 / 24)


def plms(
    schedule,
    num_steps,
    timestep_rule="leading",
    steps_offset=0,
    final_alpha="first",
    skip_prk_steps=False,
    prediction=None,
):
    """Pseudo linear multistep rows (Liu et al. 2022, arXiv 2202.09778, equations 9 and 12).

    One row more than steps: the second time is evaluated twice, and the second evaluation starts
    over from the first sample with the mean of both. As `x` is linear in what the loop keeps, that
    is a row like any other.

    Args:
        final_alpha: abar after the last step: "one", or "first" (that of time 0).
        skip_prk_steps: must be True; False is diffusers' default, with Runge-Kutta steps.
        prediction: "epsilon" only.

    Raises:
        ConfigError: an option that the rows do not express.
    """
    grids.check_choice(final_alpha, ("one", "first"), "final_alpha")
    if not skip_prk_steps or prediction not in (None, "epsilon") or schedule.kind == "edm":
        raise ConfigError(
            "PNDMScheduler is supported for epsilon predictions with skip_prk_steps=true only",
            "scheduler_config.json",
            "choose another scheduler, e.g. scheduler='dpmpp'",
        )
    times = grids.timesteps(schedule, num_steps, timestep_rule, steps_offset).astype(int)
    step = schedule.num_train_timesteps // num_steps
    t = np.concatenate([times[:1], np.repeat(times[1:2], 2), times[2:]])
    start, end = t.copy(), t - step
    if len(t) > 1:
        start[1], end[1] = t[1] + step, t[1]
    last = 1.0 if final_alpha == "one" else schedule.alphas_cumprod[0]
    now = schedule.alphas_cumprod[start]
    then = np.where(end >= 0, schedule.alphas_cumprod[np.maximum(end, 0)], last)
    a = np.sqrt(then / now)
    e = np.sqrt(1 - then) - np.sqrt(then * (1 - now) / now)
    b = np.zeros((len(t), 5))
    b[0, 0] = e[0]
    for i in range(2, len(t)):
        weights = _FIRST[i - 2] if i < 5 else _WEIGHTS
        b[i, : len(weights)] = e[i] * np.array(weights)
    if len(t) > 1:
        b[1, :2] = e[1] / 2, e[1] / 2 - a[1] / a[0] * e[0]
        a[1] /= a[0]
    alpha = np.sqrt(schedule.alphas_cumprod[t])
    return build(t, alpha, schedule.noise_levels[t], a, b, "epsilon", history="eps")

"""Solvers as tables: each function takes a schedule and a number of steps and returns a `Table`.

Defaults are those of the diffusers scheduler of the same name, without its clipping. On an `edm`
schedule `x` is noise-level scaled, the network's output is x0 and the grid is that of Karras et
al.; `timestep_rule` and `prediction` do not apply. Every function raises ConfigError for an
unknown option or a number of steps that the schedule cannot give.
"""

import numpy as np

from cnxs_jax.diffusion import grids
from cnxs_jax.diffusion.integrals import lagrange_integrals
from cnxs_jax.diffusion.prediction import boundary_scalings_f64
from cnxs_jax.diffusion.table import Table, build
from cnxs_jax.errors import ConfigError

__all__ = ["Table", "ab", "ddim", "ddpm", "deis", "dpmpp", "euler", "from_config", "lcm"]

FINAL_LEVELS = ("zero", "sigma_min")
LOWER_ORDER_BELOW = 15  # diffusers lowers the order of the last steps only in runs this short


def ddim(
    schedule,
    num_steps,
    eta=0.0,
    timestep_rule="leading",
    steps_offset=0,
    final_alpha="one",
    prediction=None,
):
    """DDIM (Song et al. 2021, eq. 12 and 16).

    Args:
        eta: 0 deterministic, 1 as noisy as DDPM.
        final_alpha: abar after the last step: "one", or "first" (that of time 0).
        prediction: "epsilon" (default for discrete schedules), "v_prediction" or "sample".
    """
    grids.check_choice(final_alpha, ("one", "first"), "final_alpha")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta must be in [0, 1], got {eta}", "eta")
    if schedule.kind == "edm":
        if eta:
            raise ConfigError("eta needs a discrete schedule", "eta")
        grid = grids.edm_grid(schedule, num_steps)
        return _first_order(schedule, grid, prediction, schedule.sigma_max)
    t = grids.timesteps(schedule, num_steps, timestep_rule, steps_offset)
    # The step is always num_train // n long, whatever the spacing: diffusers' convention.
    before = (t - schedule.num_train_timesteps // num_steps).astype(int)
    final = 1.0 if final_alpha == "one" else schedule.alphas_cumprod[0]
    abar = schedule.alphas_cumprod[t.astype(int)]
    previous = np.where(before >= 0, schedule.alphas_cumprod[np.maximum(before, 0)], final)
    variance = (1 - previous) / (1 - abar) * (1 - abar / previous)
    d = eta * np.sqrt(np.maximum(variance, 0.0))
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    a = np.sqrt(np.maximum(1 - previous - d**2, 0.0)) / sigma
    b = np.sqrt(previous) - a * alpha
    rho = schedule.noise_levels[t.astype(int)]
    return build(t, alpha, rho, a, b, _prediction(schedule, prediction), d=d)


def ddpm(
    schedule,
    num_steps,
    variance="fixed_small",
    timestep_rule="leading",
    steps_offset=0,
    prediction=None,
):
    """DDPM ancestral sampling (Ho et al. 2020, eq. 6 and 7).

    Args:
        variance: "fixed_small" (the posterior's) or "fixed_large" (beta).
    """
    _only_discrete(schedule, "ddpm")
    grids.check_choice(variance, ("fixed_small", "fixed_large"), "variance")
    t = grids.timesteps(schedule, num_steps, timestep_rule, steps_offset)
    abar = schedule.alphas_cumprod[t.astype(int)]
    previous = np.append(abar[1:], 1.0)
    beta = 1 - abar / previous
    spread = beta if variance == "fixed_large" else beta * (1 - previous) / (1 - abar)
    d = np.where(t > 0, np.sqrt(spread), 0.0)
    a = np.sqrt(abar / previous) * (1 - previous) / (1 - abar)
    b = np.sqrt(previous) * beta / (1 - abar)
    rho = schedule.noise_levels[t.astype(int)]
    return build(t, np.sqrt(abar), rho, a, b, _prediction(schedule, prediction), d=d)


def euler(
    schedule,
    num_steps,
    timestep_rule="linspace",
    steps_offset=0,
    karras=False,
    final_sigma="zero",
    prediction=None,
):
    """Euler's method on the probability-flow ODE in the noise level (Karras et al. 2022, alg. 1).

    For discrete schedules the rows are rewritten for variance-preserving `x`; `init_scale` keeps
    diffusers' start (sigma_max times noise, except under "leading").
    """
    grids.check_choice(final_sigma, FINAL_LEVELS, "final_sigma")
    if schedule.kind == "edm":
        grid = grids.edm_grid(schedule, num_steps, final_sigma)
        return _first_order(schedule, grid, prediction, schedule.sigma_max)
    t = grids.timesteps(schedule, num_steps, timestep_rule, steps_offset, whole=False)
    final = 0.0 if final_sigma == "zero" else schedule.noise_levels[0]
    grid = grids.at_times(schedule, t, min(final, _level(schedule, t[-1])))
    if karras:
        levels = grids.karras(grid.rho[0], grid.rho[-2], num_steps)
        t = grids.time_of_level(schedule, levels)
        grid = grids.from_levels(schedule, t, levels, min(final, levels[-1]))
    scale = 1.0 if timestep_rule == "leading" else grid.sigma[0]
    return _first_order(schedule, grid, prediction, scale)


def dpmpp(
    schedule,
    num_steps,
    order=2,
    timestep_rule="linspace",
    steps_offset=0,
    karras=False,
    lambdas=False,
    lower_order_final=True,
    final_sigma="zero",
    prediction=None,
):
    """DPM-Solver++ 1 and 2M, midpoint (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Args:
        karras: Karras levels over the schedule's whole range instead of `timestep_rule`.
        lambdas: levels uniform in log-SNR over the whole range.
        lower_order_final: a first-order last step in runs of fewer than 15 steps; the last step
            to `final_sigma="zero"` is first order always.
    """
    grids.check_choice(order, (1, 2), "order")
    grids.check_choice(final_sigma, FINAL_LEVELS, "final_sigma")
    grid = _multistep_grid(
        schedule, num_steps, timestep_rule, steps_offset, karras, lambdas, final_sigma
    )
    n, rho = num_steps, grid.rho
    first_last = final_sigma == "zero" or (lower_order_final and n < LOWER_ORDER_BELOW)
    a = grid.sigma[1:] / grid.sigma[:-1]
    phi = grid.alpha[1:] * (1 - rho[1:] / rho[:-1])
    b = np.zeros((n, order))
    b[:, 0] = phi
    for i in range(1, n if order == 2 else 1):
        if phi[i] == 0 or (i == n - 1 and first_last):
            continue  # the last level repeated, or a first-order end
        ratio = np.log(rho[i - 1] / rho[i]) / np.log(rho[i] / rho[i + 1])
        b[i] = phi[i] * (1 + 0.5 / ratio), -phi[i] * 0.5 / ratio
    return _build(schedule, grid, a, b, prediction)


def ab(
    schedule,
    num_steps,
    order=2,
    variable="log_rho",
    timestep_rule="linspace",
    steps_offset=0,
    karras=False,
    lower_order_final=True,
    final_sigma="sigma_min",
    prediction=None,
):
    """Exponential Adams-Bashforth: the noise is extrapolated as a polynomial and integrated.

    Args:
        order: 1 to 3.
        variable: in what the polynomial is: "log_rho" (DEIS, Zhang and Chen 2023, arXiv
            2204.13902) or "rho" (their rho-AB), with rho the noise level.
        final_sigma: "sigma_min" (diffusers' DEIS ends at the level of time 0) or "zero".
    """
    grids.check_choice(order, (1, 2, 3), "order")
    grids.check_choice(variable, ("log_rho", "rho"), "variable")
    grids.check_choice(final_sigma, FINAL_LEVELS, "final_sigma")
    grid = _multistep_grid(
        schedule, num_steps, timestep_rule, steps_offset, karras, False, final_sigma
    )
    if order == 1 or num_steps == 1:
        # The same step as below, without its float32 cancellation of x against h = noise.
        return _first_order(schedule, grid, prediction)
    n, rho = num_steps, grid.rho
    b = np.zeros((n, order))
    for i in range(n):
        used = min(order, i + 1)
        if lower_order_final and n < LOWER_ORDER_BELOW:
            used = min(used, n - i)
        nodes = rho[i - used + 1 : i + 1][::-1]
        b[i, :used] = grid.alpha[i + 1] * lagrange_integrals(nodes, rho[i], rho[i + 1], variable)
    a = grid.alpha[1:] / grid.alpha[:-1]
    return _build(schedule, grid, a, b, prediction, history="eps")


def deis(schedule, num_steps, order=2, **options):
    """DEIS with the polynomial in log rho; diffusers' DEISMultistepScheduler. Options: see `ab`."""
    return ab(schedule, num_steps, order, "log_rho", **options)


def lcm(
    schedule,
    num_steps,
    timestep_rule="diffusers",
    original_steps=50,
    sigma_data=0.5,
    timestep_scaling=10.0,
    prediction=None,
):
    """Multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3).

    Args:
        timestep_rule: which of the distilled times are used: "diffusers" (since November 2023,
            4 steps: 999, 759, 499, 259) or "official" (PixArt's repository: 999, 759, 519, 279).
        original_steps: number of times that the distillation used.
    """
    _only_discrete(schedule, "lcm")
    grids.check_choice(timestep_rule, ("diffusers", "official"), "timestep_rule")
    grids.check_steps(original_steps, schedule.num_train_timesteps)
    grids.check_steps(num_steps, original_steps)
    skip = schedule.num_train_timesteps // original_steps
    distilled = (np.arange(1, original_steps + 1) * skip - 1)[::-1]
    if timestep_rule == "diffusers":
        index = np.floor(np.linspace(0, original_steps, num_steps, endpoint=False)).astype(int)
        t = distilled[index]
    else:
        t = distilled[:: original_steps // num_steps][:num_steps]
    abar = schedule.alphas_cumprod[t]
    c_skip, c_out = boundary_scalings_f64(t, sigma_data, timestep_scaling)
    following = np.append(abar[1:], 1.0)  # after the last row: no noise, signal one
    a, b = np.sqrt(following) * c_skip, np.sqrt(following) * c_out
    chosen = _prediction(schedule, prediction)
    d = np.sqrt(1 - following)
    return build(t, np.sqrt(abar), schedule.noise_levels[t], a, b, chosen, d=d)


def from_config(config, num_steps, **options):
    """The table of a diffusers `scheduler_config.json`; see `scheduler_config.from_config`."""
    from cnxs_jax.diffusion import scheduler_config  # which imports this file

    return scheduler_config.from_config(config, num_steps, **options)


def _multistep_grid(schedule, num_steps, rule, offset, karras, lambdas, final_sigma):
    if schedule.kind == "edm":
        return grids.edm_grid(schedule, num_steps, final_sigma)
    if karras and lambdas:
        raise ConfigError("choose one of karras and lambdas", "karras, lambdas")
    final = 0.0 if final_sigma == "zero" else schedule.noise_levels[0]
    if not karras and not lambdas:
        t = grids.multistep_timesteps(schedule, num_steps, rule, offset)
        return grids.at_times(schedule, t, final)
    grids.check_steps(num_steps, schedule.num_train_timesteps)
    spacing = grids.karras if karras else grids.log_uniform
    levels = spacing(schedule.noise_levels[-1], schedule.noise_levels[0], num_steps)
    t = np.round(grids.time_of_level(schedule, levels))
    return grids.from_levels(schedule, t, levels, min(final, levels[-1]))


def _first_order(schedule, grid, prediction, init_scale=None):
    """DDIM between the points of a grid: `x' = alpha' x0 + sigma' noise`."""
    a = grid.sigma[1:] / grid.sigma[:-1]
    b = grid.alpha[1:] - a * grid.alpha[:-1]
    return _build(schedule, grid, a, b, prediction, init_scale=init_scale)


def _build(schedule, grid, a, b, prediction, history="x0", init_scale=None):
    if init_scale is None:
        init_scale = schedule.sigma_max if schedule.kind == "edm" else 1.0
    chosen = _prediction(schedule, prediction)
    alpha, rho = grid.alpha[:-1], grid.rho[:-1]
    return build(grid.t, alpha, rho, a, b, chosen, history=history, init_scale=init_scale)


def _prediction(schedule, prediction):
    default = "sample" if schedule.kind == "edm" else "epsilon"
    if schedule.kind == "edm" and prediction not in (None, "sample"):
        raise ConfigError(f"an edm network outputs x0, got {prediction!r}", "prediction")
    return prediction or default


def _only_discrete(schedule, name):
    if schedule.kind != "discrete":
        raise ConfigError(
            f"{name} needs a discrete schedule", "schedule", "use euler, dpmpp or ab for edm"
        )


def _level(schedule, t):
    return np.interp(t, np.arange(schedule.num_train_timesteps), schedule.noise_levels)

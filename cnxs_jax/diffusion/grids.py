"""Where a solver evaluates the network: timestep rules and noise-level grids, in float64.

The spacings carry diffusers' names (Lin et al. 2023, arXiv 2305.08891, table 2) and its rounding,
which differs between scheduler families: the one-step ones choose n points, the multistep ones
choose n + 1 and drop the cleanest.
"""

from typing import NamedTuple

import numpy as np

from cnxs_jax.errors import ConfigError, did_you_mean

SPACINGS = ("leading", "trailing", "linspace")
KARRAS_RHO = 7.0


class Grid(NamedTuple):
    """`t [n]`, and at its n points plus the end `alpha [n+1]`, `rho [n+1]` (rho = sigma/alpha)."""

    t: np.ndarray
    alpha: np.ndarray
    rho: np.ndarray

    @property
    def sigma(self):
        """Noise coefficient `alpha * rho`, `[n+1]`."""
        return self.alpha * self.rho


def check_choice(value, choices, where):
    """Raises ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(
            f"unknown {where} {value!r}.{did_you_mean(value, choices)}",
            where,
            f"use one of {', '.join(map(str, choices))}",
        )


def check_steps(num_steps, most):
    """Raises ConfigError unless `num_steps` is a whole number in [1, most]."""
    whole = isinstance(num_steps, int | np.integer) and not isinstance(num_steps, bool)
    if not whole or not 1 <= num_steps <= most:
        raise ConfigError(
            f"the number of steps must be a whole number from 1 to {most}, got {num_steps!r}",
            "num_inference_steps",
        )


def timesteps(schedule, num_steps, rule, steps_offset=0, whole=True):
    """`[n]` descending times of the one-step solvers (DDIM, DDPM, Euler).

    `whole` rounds them; Euler evaluates at fractional times under "linspace".
    """
    check_choice(rule, SPACINGS, "timestep_rule")
    total = schedule.num_train_timesteps
    check_steps(num_steps, total)
    if rule == "linspace":
        t = np.linspace(0, total - 1, num_steps)[::-1]
        t = np.round(t) if whole else t.astype(np.float32).astype(np.float64)
    elif rule == "leading":
        t = np.arange(num_steps)[::-1] * (total // num_steps) + steps_offset
    else:
        t = trailing(total, num_steps)
    return in_range(t, total)


def multistep_timesteps(schedule, num_steps, rule, steps_offset=0):
    """`[n]` descending whole times of the multistep solvers (DPM-Solver++, DEIS)."""
    check_choice(rule, SPACINGS, "timestep_rule")
    total = schedule.num_train_timesteps
    check_steps(num_steps, total)
    if rule == "linspace":
        t = np.round(np.linspace(0, total - 1, num_steps + 1))[::-1][:-1]
    elif rule == "leading":
        points = np.arange(num_steps + 1)[::-1][:-1]
        t = points * (total // (num_steps + 1)) + steps_offset
    else:
        t = trailing(total, num_steps)
    return in_range(t, total)


def trailing(total, num_steps):
    """Counts back from the last time; the slice drops a point that rounding would add."""
    return np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1


def in_range(t, total):
    """Returns `t`, or raises ConfigError if `steps_offset` pushed it off the schedule."""
    if t[0] >= total or t[-1] < 0:
        raise ConfigError(
            f"timesteps from {t[0]:g} to {t[-1]:g} are outside [0, {total})",
            "steps_offset",
            "use fewer steps or a smaller offset",
        )
    return t.astype(np.float64)


def from_levels(schedule, t, levels, final):
    """A Grid of the noise levels `levels [n]`, then `final`.

    Raises:
        ConfigError: the levels do not fall strictly, so that two steps would be one.
    """
    if np.any(np.diff(levels) >= 0) or final > levels[-1]:
        raise ConfigError(
            f"{len(levels)} steps repeat a noise level under this rule",
            "num_inference_steps",
            "use fewer steps or another timestep_rule",
        )
    rho = np.append(levels, final)
    alpha = np.ones_like(rho) if schedule.kind == "edm" else 1.0 / np.sqrt(1.0 + rho**2)
    return Grid(np.asarray(t, np.float64), alpha, rho)


def edm_grid(schedule, num_steps, final="zero"):
    """Karras et al. 2022, eq. 5, from sigma_max to sigma_min, then 0 unless `final` says so."""
    check_steps(num_steps, 10_000)
    levels = karras(schedule.sigma_max, schedule.sigma_min, num_steps, schedule.rho)
    last = {"zero": 0.0, "sigma_min": levels[-1]}[final]
    return from_levels(schedule, levels, levels, last)


def at_times(schedule, t, final):
    """The Grid at times `t [n]` (levels interpolated between training times), then `final`."""
    levels = schedule.noise_levels
    return from_levels(schedule, t, np.interp(t, np.arange(len(levels)), levels), final)


def karras(high, low, num_steps, rho=KARRAS_RHO):
    """`n` levels from `high` to `low`, equally spaced in `sigma^(1/rho)`."""
    ramp = np.linspace(0, 1, num_steps)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def log_uniform(high, low, num_steps):
    """`n` levels from `high` to `low`, equally spaced in log-SNR (Lu et al. 2022, DPM-Solver)."""
    return np.exp(np.linspace(np.log(high), np.log(low), num_steps))


def time_of_level(schedule, levels):
    """Fractional training times whose noise levels are `levels` (linear in their logarithm)."""
    known = np.log(schedule.noise_levels)
    return np.interp(np.log(levels), known, np.arange(len(known)))

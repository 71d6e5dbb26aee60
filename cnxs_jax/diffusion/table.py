"""The solver table: one row a network evaluation, read by the loop in `sampling`.

With `h_-k` the value of `h` k rows before, a row does
`x0 = post(p x + q out)`; `h = u x + v x0`; `x <- a x + sum_k b[k] h_-k + d noise`.

A Table is a pytree. Its numeric columns are leaves, so a jitted function that takes a table as an
argument is not compiled again when only their values change. `expert`, `guided` and `stochastic`
are static.
"""

from dataclasses import dataclass, replace

import jax
import numpy as np

from cnxs_jax.diffusion.schedule import PREDICTIONS, check_prediction
from cnxs_jax.errors import ConfigError

COLUMNS = ("t", "sigma", "p", "q", "u", "v", "a", "b", "d", "control")
STATIC = ("expert", "guided", "stochastic")


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of `n` rows: float64 numpy on the host, float32 once inside a jitted function.

    Attributes:
        t: time given to the network: an integer value or, between training times, a fraction; the
            noise level itself for edm schedules.
        sigma: noise level `sigma / alpha`, which the loop writes to `cond["sigma"]`.
        p, q, u, v, a, d: `[n]` coefficients, see the module.
        b: `[n, K]`; K - 1 earlier values of `h` are kept.
        control: `[n]`, or `[n, M]` for M adapters; factor on `cond["control_scale"]`.
        init_scale: scalar; `x` starts as `init_scale` times standard normal noise.
        expert: which expert runs each row (static).
        guided: False where the unconditional half is not evaluated (static).
        stochastic: whether any `d` is not zero (static).
    """

    t: np.ndarray
    sigma: np.ndarray
    p: np.ndarray
    q: np.ndarray
    u: np.ndarray
    v: np.ndarray
    a: np.ndarray
    b: np.ndarray
    d: np.ndarray
    control: np.ndarray
    init_scale: np.ndarray
    expert: tuple
    guided: tuple
    stochastic: bool

    def __len__(self):
        return len(self.expert)

    @property
    def num_experts(self):
        """How many experts the table asks for."""
        return max(self.expert) + 1

    def num_evaluations(self, guidance=True):
        """Network evaluations an image costs: a guided row counts 2 if `guidance`, else 1."""
        return sum(2 if guidance and guided else 1 for guided in self.guided)

    def with_control(self, start=0.0, end=1.0):
        """Lets the controller act on rows i with `i/n >= start` and `(i+1)/n <= end`.

        The rule is that of diffusers' control_guidance_start and _end. `start` and `end` may be
        lists of one length, one entry an adapter. Never recompiles for scalars.
        """
        start, end = np.broadcast_arrays(np.asarray(start, float), np.asarray(end, float))
        if not (np.all(start >= 0) and np.all(start < end) and np.all(end <= 1)):
            raise ConfigError(
                f"control needs 0 <= start < end <= 1, got {start.tolist()} and {end.tolist()}",
                "control_guidance_start, control_guidance_end",
            )
        n = len(self)
        i = np.arange(n).reshape((n,) + (1,) * start.ndim)
        return replace(self, control=((i / n >= start) & ((i + 1) / n <= end)).astype(np.float64))

    def with_guidance_off(self, low, high):
        """No guidance on rows with noise level in `[low, high)`; they cost one evaluation.

        Levels are `sigma / alpha`, as in the `sigma` column (guidance in a limited interval,
        Kynkaanniemi et al. 2024, arXiv 2404.07724).
        """
        if not low < high:
            raise ConfigError(f"need low < high, got {low} and {high}", "with_guidance_off")
        off = (np.asarray(self.sigma) >= low) & (np.asarray(self.sigma) < high)
        guided = tuple(g and not o for g, o in zip(self.guided, off.tolist(), strict=True))
        return replace(self, guided=guided)


jax.tree_util.register_dataclass(
    Table, data_fields=[*COLUMNS, "init_scale"], meta_fields=list(STATIC)
)


def build(t, alpha, rho, a, b, prediction, *, d=None, history="x0", init_scale=1.0):
    """A table of `n` rows whose network predicts `prediction`.

    Args:
        t, alpha, rho: `[n]` time, signal coefficient and noise level of each row.
        a, d: `[n]`; b: `[n, K]` or `[n]`.
        history: what `h` is: "x0", or "eps" for the exponential integrators.
    """
    check_prediction(prediction)
    t, alpha, rho, a, b = (np.asarray(c, np.float64) for c in (t, alpha, rho, a, b))
    n, sigma = len(t), alpha * rho
    zero, one = np.zeros(n), np.ones(n)
    x0_of = dict(
        zip(PREDICTIONS, ((1 / alpha, -sigma / alpha), (alpha, -sigma), (zero, one)), strict=True)
    )
    u, v = (zero, one) if history == "x0" else (1 / sigma, -alpha / sigma)
    d = zero if d is None else np.asarray(d, np.float64)
    p, q = x0_of[prediction]
    return Table(
        *(t, rho, p, q, u, v, a, b.reshape(n, -1), d, one, np.float64(init_scale)),
        expert=(0,) * n,
        guided=(True,) * n,
        stochastic=bool(np.any(d != 0)),
    )

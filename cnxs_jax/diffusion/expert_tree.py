"""Which noise levels an expert denoiser owns (eDiff-I, arXiv 2211.01324, section 4).

The training noise distribution is cut into intervals of quantiles. Node `E[l, i]` of a binary tree
is the i-th of `2^l` intervals of equal probability, i = 0 with the lowest noise; what the chosen
nodes leave free belongs to complement experts. Quantiles, unlike noise levels, mean the same under
every schedule.

    experts = cover([(3, 0), (9, 511)])           # E[3,0], the rest, E[9,511]
    table = route(table, experts, LogNormal())    # the static expert column
    low, high = experts[2].with_margin(0.1)       # what that expert is trained on
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, ndtr, ndtri

from cnxs_jax.diffusion import experts as routing
from cnxs_jax.errors import ConfigError

HALF_STEP = 2.0**-24  # half of the spacing of float32 uniform numbers: never 0, never 1


@dataclass(frozen=True)
class Interval:
    """Quantiles `[low, high)` of the training noise distribution, low noise first."""

    low: float
    high: float
    name: str = ""

    def __post_init__(self):
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ConfigError(
                f"quantiles must satisfy 0 <= low < high <= 1, got [{self.low}, {self.high})",
                "expert interval",
            )

    @property
    def mass(self):
        """Share of the training noise distribution."""
        return self.high - self.low

    def with_margin(self, margin):
        """`(low, high)` widened at either side by `margin` times the interval's own mass.

        A model trained on exactly its interval is worst near the edges. Routing stays exact.
        """
        if not 0 <= margin <= 1:
            raise ConfigError(f"margin must be in [0, 1], got {margin}", "margin")
        return max(0.0, self.low - margin * self.mass), min(1.0, self.high + margin * self.mass)


WHOLE = Interval(0.0, 1.0, "E[0,0]")


def node(level, index):
    """Tree node `E[level, index]`: quantiles `[index / 2^level, (index + 1) / 2^level)`.

    Dyadic numbers are exact in float64, so neighbouring nodes share their edge to the bit.
    """
    if not 0 <= level <= 50 or not 0 <= index < 2**level:
        raise ConfigError(
            f"there is no node E[{level},{index}]: level l has the indices 0 to 2^l - 1",
            "experts",
        )
    size = 2**level
    return Interval(index / size, (index + 1) / size, f"E[{level},{index}]")


def equal(num_experts):
    """`num_experts` intervals of equal probability, lowest noise first."""
    if num_experts < 1:
        raise ConfigError(f"the number of experts must be >= 1, got {num_experts}", "experts")
    edges = [i / num_experts for i in range(num_experts + 1)]
    return tuple(
        Interval(a, b, f"{i + 1}/{num_experts}")
        for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))
    )


def cover(nodes):
    """Experts for `(level, index)` nodes and for each gap between them, lowest noise first.

    The published ensemble is `cover([(3, 0), (9, 511)])`: three experts.

    Raises:
        ConfigError: a node that does not exist, or two that overlap.
    """
    chosen = sorted((node(*n) for n in nodes), key=lambda e: (e.low, e.high))
    filled, end = [], 0.0
    for expert in [*chosen, None]:
        start = 1.0 if expert is None else expert.low
        if start > end:
            filled.append(Interval(end, start, f"C[{end:g},{start:g}]"))
        if expert is not None:
            filled.append(expert)
            end = expert.high
    return check_cover(filled)


def check_cover(intervals):
    """`intervals` as a tuple, lowest noise first, if they hold each noise level exactly once.

    Raises:
        ConfigError: a gap or an overlap, with the quantiles where it is.
    """
    ordered = tuple(sorted(intervals, key=lambda e: (e.low, e.high)))
    where = "experts"
    if not ordered:
        raise ConfigError("there are no experts", where, "give at least one node")
    end, before = 0.0, "the start"
    for expert in (*ordered, None):
        start, name = (1.0, "the end") if expert is None else (expert.low, expert.name)
        if start > end:
            what = f"no expert has the quantiles [{end:g}, {start:g}), from {before} to {name}"
            raise ConfigError(what, where, "let `cover` add the complement")
        if start < end:
            what = f"{before} and {name} overlap in the quantiles [{start:g}, {end:g})"
            raise ConfigError(what, where, "take nodes of which none contains another")
        if expert is not None:
            end, before = expert.high, expert.name
    return ordered


@dataclass(frozen=True)
class LogNormal:
    """Noise levels with a normal logarithm (EDM's training distribution, arXiv 2206.00364).

    Attributes:
        mean, std: of the natural logarithm of the noise level.
        scale: factor on the level; super-resolution stages train at more noise.
    """

    mean: float = -1.2
    std: float = 1.2
    scale: float = 1.0
    by = "sigma"

    def __post_init__(self):
        if not self.std > 0 or not self.scale > 0:
            raise ConfigError(f"std {self.std} and scale {self.scale} must be > 0", "LogNormal")

    def edge(self, quantile):
        """Noise level at a quantile, float64 on the host."""
        return self.scale * np.exp(self.mean + self.std * ndtri(np.float64(quantile)))

    def quantile(self, sigma):
        """Share of the distribution below noise level `sigma`, float64 on the host."""
        with np.errstate(divide="ignore"):  # level 0 has the quantile 0
            z = (np.log(np.asarray(sigma, np.float64) / self.scale) - self.mean) / self.std
        return ndtr(z)

    def from_uniform(self, uniform, low=0.0, high=1.0):
        """Noise levels, float32, for `uniform` in (0, 1) within the quantiles [low, high)."""
        z = truncated_normal(uniform, low, high)
        return self.scale * jnp.exp(self.mean + self.std * z)

    def draw(self, key, low=0.0, high=1.0):
        """One noise level of the quantiles [low, high), which may be traced; float32 scalar."""
        return self.from_uniform(jax.random.uniform(key) + HALF_STEP, low, high)


@dataclass(frozen=True)
class Mixture:
    """Another distribution over the same noise levels: intervals of `levels`, each so often.

    What experts with unequal shares of the batches see together, for one model to train on.

    Attributes:
        levels: a `LogNormal`.
        intervals: `Interval`s.
        shares: how often each is drawn, in any unit.
    """

    levels: LogNormal
    intervals: tuple
    shares: tuple

    def draw(self, key, low=0.0, high=1.0):
        """One noise level; the limits belong to `intervals` and are not read."""
        which, within = jax.random.split(key)
        edges = jnp.array([(i.low, i.high) for i in self.intervals], jnp.float32)
        chosen = jax.random.categorical(which, jnp.log(jnp.array(self.shares, jnp.float32)))
        return self.levels.draw(within, *edges[chosen])


@dataclass(frozen=True)
class Times:
    """Integer training times `0 .. num_steps - 1` of a discrete schedule.

    Attributes:
        logit_normal: `(mean, std)` of a density over them (Esser et al. 2024, section 3.1);
            uniform unless given.
    """

    num_steps: int = 1000
    logit_normal: tuple | None = None
    by = "t"

    def __post_init__(self):
        if self.logit_normal is not None and not self.logit_normal[1] > 0:
            what = f"std {self.logit_normal[1]} is not above 0"
            raise ConfigError(what, "logit_normal", "e.g. (0.0, 1.0)")

    def edge(self, quantile):
        """First time at or above a quantile (rounded half up), an integer in [0, num_steps]."""
        part = np.float64(quantile)
        if self.logit_normal is not None:
            mean, std = self.logit_normal
            part = expit(mean + std * ndtri(part))
        return int(np.floor(part * self.num_steps + 0.5))

    def limits(self, low, high):
        """Times `[first, end)` of the quantiles [low, high).

        Raises:
            ConfigError: the interval is narrower than one training time.
        """
        first, end = self.edge(low), self.edge(high)
        if first >= end:
            raise ConfigError(
                f"the quantiles [{low:g}, {high:g}) hold none of {self.num_steps} timesteps",
                "experts",
                "take a node nearer to the root",
            )
        return first, end

    def draw(self, key, low=0.0, high=1.0):
        """One time of the quantiles [low, high), which are numbers; int32 scalar."""
        first, end = self.limits(low, high)
        if self.logit_normal is None:
            return jax.random.randint(key, (), first, end)
        mean, std = self.logit_normal
        z = truncated_normal(jax.random.uniform(key) + HALF_STEP, low, high)
        part = jax.nn.sigmoid(mean + std * z)
        return jnp.clip(jnp.int32(part * self.num_steps), first, end - 1)


def truncated_normal(uniform, low, high):
    """Standard normal numbers within the quantiles [low, high), float32 of uniform's shape.

    The inverse of the distribution function, taken from the nearer tail: in float32 a quantile
    near 1 would leave the top expert a few hundred distinct noise levels.
    """
    low, high, uniform = (jnp.asarray(v, jnp.float32) for v in (low, high, uniform))
    upper = low + high > 1.0
    near = jnp.where(upper, 1.0 - high, low)
    z = jax.scipy.special.ndtri(near + (high - low) * jnp.where(upper, 1.0 - uniform, uniform))
    return jnp.where(upper, -z, z)


def edges(intervals, distribution):
    """Rising edges between experts, `[E - 1]`: noise levels (LogNormal) or times (Times).

    Raises:
        ConfigError: see `check_cover`; or an expert that holds no timestep.
    """
    ordered = check_cover(intervals)
    if distribution.by == "t":
        for expert in ordered:
            distribution.limits(expert.low, expert.high)
    return np.array([distribution.edge(expert.low) for expert in ordered[1:]], np.float64)


def route(table, intervals, distribution):
    """`table` with its static expert column: each row, a network evaluation, to the owner.

    Expert 0 has the lowest noise. Levels beyond the training range go to the outermost experts.
    """
    return routing.route(table, edges(intervals, distribution), by=distribution.by)

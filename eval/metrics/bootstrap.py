"""95 % intervals of figures over pictures, in the form that the report prints.

A figure is `{"value", "low", "high", "n"}`; `n` counts what was averaged. The unit that is drawn
again is the picture: items of one picture are not independent.
"""

import numpy as np

from cnxs_jax.errors import DataError

Z95 = 1.959963984540054


def mean(values, resamples=1000, seed=0):
    """The mean of one value a picture `[N]` with its percentile bootstrap interval.

    Raises:
        DataError: no values, or non-finite ones.
    """
    values = np.asarray(values, np.float64)
    return ratio(values, np.ones(values.shape), resamples, seed)


def ratio(numerators, denominators, resamples=1000, seed=0):
    """sum(numerators) / sum(denominators), pictures drawn with replacement (both `[N]`).

    The right form for "items right of items asked": pictures with more items weigh more.

    Raises:
        DataError: no pictures, unpaired or non-finite arrays, or denominators that sum to zero.
    """
    top, bottom = (np.asarray(a, np.float64) for a in (numerators, denominators))
    if top.ndim != 1 or top.shape != bottom.shape or not bottom.sum():
        raise DataError(
            f"expected two [N] arrays, the second above zero: {top.shape}, {bottom.shape}",
            "bootstrap",
        )
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise DataError("the mean of non-finite values has no interval", "bootstrap")
    picks = np.random.default_rng(seed).integers(0, len(top), (resamples, len(top)))
    ratios = top[picks].sum(1) / np.maximum(bottom[picks].sum(1), 1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return _figure(top.sum() / bottom.sum(), low, high, bottom.sum())


def statistic(function, array, resamples=1000, seed=0):
    """`function(array)` for any array `[N, ...]` of per-picture parts, rows drawn again."""
    array = np.asarray(array)
    rng, n = np.random.default_rng(seed), len(array)
    drawn = [function(array[rng.integers(0, n, n)]) for _ in range(resamples)]
    return _figure(function(array), *np.quantile(drawn, [0.025, 0.975]), n)


def proportion(right, total):
    """`right` of `total` independent trials, with Wilson's score interval."""
    return _figure(right / total, *wilson(right, total), total)


def wilson(right, total):
    """Wilson's 95 % score interval of a proportion: (low, high)."""
    p, z2 = right / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * np.sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _figure(value, low, high, n):
    return {"value": float(value), "low": float(low), "high": float(high), "n": int(n)}

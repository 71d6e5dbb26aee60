"""Kernel inception distance on any features: the unbiased squared MMD with a cubic kernel.

Binkowski et al. 2018, "Demystifying MMD GANs", section 3 and equation (4):
k(x, y) = (<x, y> / d + 1)^3. All arithmetic in float64 on the host. The published metric uses
Inception features; here the name carries the network (`kid_efflite0`).
"""

import dataclasses

import numpy as np

from cnxs_jax.errors import DataError

Z95 = 1.959963984540054


@dataclasses.dataclass(frozen=True)
class Kid:
    """An estimate (not multiplied by 1000), its 95 % interval and the sizes of both samples."""

    value: float
    low: float
    high: float
    stderr: float
    num_x: int
    num_y: int

    def as_dict(self):
        return dataclasses.asdict(self)


def kernel(x, y):
    """(<x, y> / d + 1)^3 for `x [n, d]`, `y [m, d]` -> `[n, m]` float64."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def kid(x, y, block=1024):
    """Unbiased MMD^2 between all of `x [n, d]` and all of `y [m, d]`, with a jackknife interval.

    The estimate uses every pair (no subsets), in blocks of rows, so memory is block * (n + m). The
    interval is the two-sample jackknife's: leaving one image out changes the estimate by an amount
    that the kernel's row sums already give. Being unbiased, it may come out below zero.

    Raises:
        DataError: fewer than three rows on a side, different widths or non-finite features.
    """
    x, y = _checked(x, y)
    n, m = len(x), len(y)
    xx, yy = _row_sums(x, x, block) - _diagonal(x), _row_sums(y, y, block) - _diagonal(y)
    xy, yx = _row_sums(x, y, block), _row_sums(y, x, block)
    value = xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * xy.sum() / (n * m)
    variance = _jackknife(xx, xy, m) + _jackknife(yy, yx, n)
    stderr = float(np.sqrt(variance))
    value = float(value)
    return Kid(value, value - Z95 * stderr, value + Z95 * stderr, stderr, n, m)


def kid_subsets(x, y, subset_size=1000, num_subsets=100, seed=0):
    """(mean, standard deviation) over random subsets: the convention of the published packages.

    The spread is that of an estimate at `subset_size`, not the error of the mean: use `kid` for
    intervals.

    Raises:
        DataError: a subset larger than a sample.
    """
    x, y = _checked(x, y)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise DataError(
            f"subset_size {subset_size} does not fit samples of {len(x)} and {len(y)}",
            "kid_subsets",
            "use a smaller subset_size or more images",
        )
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        a = x[rng.choice(len(x), subset_size, replace=False)]
        b = y[rng.choice(len(y), subset_size, replace=False)]
        xx, yy = kernel(a, a), kernel(b, b)
        pairs = subset_size * (subset_size - 1)
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / pairs
        values.append(within - 2 * kernel(a, b).mean())
    return float(np.mean(values)), float(np.std(values))


def _checked(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 3:
        raise DataError(
            f"KID needs two [n >= 3, d] feature arrays of one width, got {x.shape} and {y.shape}",
            "kid",
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("KID got non-finite features", "kid", "look at the images that made them")
    return x, y


def _row_sums(x, y, block):
    return np.concatenate([kernel(x[i : i + block], y).sum(1) for i in range(0, len(x), block)])


def _diagonal(x):
    return ((x * x).sum(1) / x.shape[1] + 1.0) ** 3


def _jackknife(within, across, other):
    """Variance from leaving out one row of one sample, whose kernel row sums are given."""
    n = len(within)
    left = (within.sum() - 2 * within) / ((n - 1) * (n - 2))
    left -= 2 * (across.sum() - across) / ((n - 1) * other)
    return (n - 1) / n * np.sum((left - left.mean()) ** 2)

"""Squared maximum mean discrepancy (MMD) of two sets of features: unbiased, and as CMMD has it.

Gretton et al. 2012, "A Kernel Two-Sample Test": equation (3) is the unbiased estimate, (5) the
biased one. All arithmetic in float64 on the host, in blocks of rows.
"""

import dataclasses

import numpy as np

from cnxs_jax.errors import ConfigError
from eval.metrics import inputs
from eval.metrics.bootstrap import Z95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate, its 95 % interval and the sizes of both samples."""

    value: float
    low: float
    high: float
    stderr: float
    num_x: int
    num_y: int

    @classmethod
    def of(cls, value, stderr, x, y):
        """The normal interval of a value and its standard error."""
        value, stderr = float(value), float(stderr)
        return cls(value, value - Z95 * stderr, value + Z95 * stderr, stderr, len(x), len(y))

    def as_dict(self):
        return dataclasses.asdict(self)


def mmd_rbf(x, y, sigma=10.0, block=1024):
    """Unbiased squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)), as an `Estimate`.

    Args:
        x, y: features `[n, d]` and `[m, d]`.
        sigma: bandwidth, in the features' units. CMMD's 10 belongs to CLIP embeddings of unit
            length, where |x - y| <= 2 and the kernel is nearly linear.

    Raises:
        ConfigError: a bandwidth that is not positive.
        DataError: fewer than three rows on a side, different widths or non-finite features.
    """
    return unbiased(x, y, rbf(sigma), "mmd_rbf", block)


def cmmd(x, y, block=1024):
    """CMMD in the units that are published: 1000 times the biased estimate, sigma = 10.

    Jayasumana et al. 2024, "Rethinking FID", section 4: x and y are CLIP ViT-L/14@336 image
    embeddings; they are scaled to unit length here, as in the published code. On other features it
    is `mmd_rbf`, not CMMD. The bias is about 1000 (1 - mean k) (1/n + 1/m) and never negative.

    Raises:
        DataError: fewer than two rows on a side, different widths or non-finite features.
    """
    x, y = inputs.features(x, y, "cmmd")
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    k = rbf(10.0)
    xx, yy, xy = (_row_sums(k, *pair, block).mean() for pair in ((x, x), (y, y), (x, y)))
    return float(1000 * (xx / len(x) + yy / len(y) - 2 * xy / len(y)))


def cmmd_interval(x, y, block=1024):
    """{"low", "high", "num_x", "num_y"} of `cmmd`, in its units, from `unbiased`'s jackknife.

    The biased estimate lies above the unbiased one by a nearly constant amount, so its interval is
    the same one, moved.
    """
    unit = [np.asarray(a, np.float64) for a in (x, y)]
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in unit]
    spread = 1000 * Z95 * mmd_rbf(*unit, block=block).stderr
    value = cmmd(x, y, block)
    return {"low": max(value - spread, 0.0), "high": value + spread, "num_x": len(x),
            "num_y": len(y)}  # fmt: skip


def rbf(sigma):
    """The Gaussian kernel: `x [n, d]`, `y [m, d]` -> `[n, m]`."""
    if not sigma > 0:
        raise ConfigError(f"sigma must be positive, got {sigma}", "mmd_rbf")

    def kernel(x, y):
        return np.exp(-squared_distances(x, y) / (2 * sigma**2))

    return kernel


def squared_distances(x, y):
    """|x - y|^2 of all pairs of rows, `[n, m]`, never negative."""
    squared = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * (x @ y.T)
    return np.maximum(squared, 0, out=squared)


def unbiased(x, y, kernel, metric, block=1024):
    """Unbiased squared MMD between all of `x` and all of `y`, with a jackknife interval.

    The estimate uses every pair (no subsets); memory is block * (n + m). The interval is the
    two-sample jackknife's: leaving one row out changes the estimate by an amount that the kernel's
    row sums already give. Being unbiased, it may come out below zero.

    Args:
        kernel: function of `[n, d]` and `[m, d]` to `[n, m]`.
        metric: its name, for errors.
    """
    x, y = inputs.features(x, y, metric, least=3)
    n, m = len(x), len(y)
    xx, yy = (_row_sums(kernel, a, a, block, others=True) for a in (x, y))
    xy, yx = _row_sums(kernel, x, y, block), _row_sums(kernel, y, x, block)
    value = xx.sum() / (n * (n - 1)) + yy.sum() / (m * (m - 1)) - 2 * xy.sum() / (n * m)
    return Estimate.of(value, np.sqrt(_jackknife(xx, xy, m) + _jackknife(yy, yx, n)), x, y)


def _row_sums(kernel, x, y, block, others=False):
    """Sums of the kernel over `y` for each row of `x`; `others`: y is x, without the row itself."""
    sums = []
    for start in range(0, len(x), block):
        values = kernel(x[start : start + block], y)
        own = np.arange(len(values))
        sums.append(values.sum(1) - (values[own, start + own] if others else 0))
    return np.concatenate(sums)


def _jackknife(within, across, other):
    """Variance from leaving out one row of one sample, whose kernel row sums are given."""
    n = len(within)
    left = (within.sum() - 2 * within) / ((n - 1) * (n - 2))
    left -= 2 * (across.sum() - across) / ((n - 1) * other)
    return (n - 1) / n * np.sum((left - left.mean()) ** 2)

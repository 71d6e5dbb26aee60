"""Kernel inception distance on any features: the unbiased squared MMD with a cubic kernel.

Binkowski et al. 2018, "Demystifying MMD GANs", section 3 and equation (4):
k(x, y) = (<x, y> / d + 1)^3. All arithmetic in float64 on the host. The published metric uses
Inception features; here the name carries the network (`kid_efflite0`).
"""

import numpy as np

from cnxs_jax.errors import DataError
from eval.metrics import inputs, mmd


def kernel(x, y):
    """(<x, y> / d + 1)^3 for `x [n, d]`, `y [m, d]` -> `[n, m]` float64."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def kid(x, y, block=1024):
    """Unbiased MMD^2 between `x [n, d]` and `y [m, d]` (not times 1000), as an `mmd.Estimate`.

    Every pair is used (no subsets), and the interval is a jackknife's (`mmd.unbiased`).

    Raises:
        DataError: fewer than three rows on a side, different widths or non-finite features.
    """
    return mmd.unbiased(x, y, kernel, "kid", block)


def kid_subsets(x, y, subset_size=1000, num_subsets=100, seed=0):
    """(mean, standard deviation) over random subsets: the convention of the published packages.

    The spread is that of an estimate at `subset_size`, not the error of the mean: use `kid` for
    intervals.

    Raises:
        DataError: a subset larger than a sample.
    """
    x, y = inputs.features(x, y, "kid", least=3)
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

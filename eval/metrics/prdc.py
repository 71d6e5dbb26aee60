"""Precision, recall, density and coverage of generated features: fidelity apart from diversity.

Precision and recall: Kynkaanniemi et al. 2019, "Improved Precision and Recall", section 2 (there
k = 3); density and coverage: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics", section
3 (there k = 5). A sample's manifold is the union of balls around its points that reach to the k-th
nearest neighbour.
"""

import numpy as np

from cnxs_jax.errors import DataError
from eval.metrics import bootstrap, inputs
from eval.metrics.mmd import squared_distances


def prdc(real, fake, k=5, block=1024):
    """{"precision", "recall", "density", "coverage"} as figures with intervals.

    precision: fraction of fakes on the real manifold. recall: fraction of reals on the fake
    manifold. density: real balls around a fake, divided by k; above 1 where fakes crowd where reals
    are dense. coverage: fraction of real balls with a fake inside. All four depend on k and both
    sample sizes. For samples of one distribution density is 1 and coverage 1 - 2^-k in expectation
    (equal sizes, large n), while precision and recall fall short of 1 in high dimensions.

    The intervals are over the points that are counted, with the manifolds held fixed: Wilson's, and
    a bootstrap for density (drawing the manifold's points again would give balls of no size).

    Args:
        real, fake: features `[n, d]` and `[m, d]`.
        block: rows of a block of distances; memory is block * max(n, m).

    Raises:
        DataError: not more than k rows on a side, different widths or non-finite features.
    """
    real, fake = inputs.features(real, fake, "prdc")
    if not 1 <= k < min(len(real), len(fake)):
        raise DataError(f"k = {k} needs more points than {len(real)} and {len(fake)}", "prdc")
    centre = real.mean(0)  # distances do not change, their rounding errors shrink
    real, fake = real - centre, fake - centre
    real_radii, fake_radii = (_radii(x, k, block) for x in (real, fake))
    inside_real = np.zeros(len(fake), int)  # real balls around each fake
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start in range(0, len(real), block):
        rows = slice(start, start + block)
        distances = squared_distances(real[rows], fake)
        inside = distances < real_radii[rows, None]
        inside_real += inside.sum(0)
        covered[rows] = inside.any(1)
        recalled[rows] = (distances < fake_radii[None]).any(1)
    return {
        "precision": bootstrap.proportion(int((inside_real > 0).sum()), len(fake)),
        "recall": bootstrap.proportion(int(recalled.sum()), len(real)),
        "density": bootstrap.mean(inside_real / k),
        "coverage": bootstrap.proportion(int(covered.sum()), len(real)),
    }


def _radii(x, k, block):
    """Squared distance of every row to its k-th nearest neighbour among the others."""
    radii = []
    for start in range(0, len(x), block):
        distances = squared_distances(x[start : start + block], x)
        own = np.arange(len(distances))
        distances[own, start + own] = 0  # itself comes first, whatever rounding says
        radii.append(np.partition(distances, k, axis=1)[:, k])
    # The balls are open (a point on the border is outside), also after rounding.
    return np.concatenate(radii) * (1 - 1e-9)

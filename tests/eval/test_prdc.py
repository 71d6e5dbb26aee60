"""Precision, recall, density, coverage: counted by hand, known answers, published expectations."""

import numpy as np
import pytest

from cnxs_jax.errors import DataError
from eval.metrics.prdc import prdc


def gaussians(n, d, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def values(real, fake, k=5, **kw):
    found = prdc(real, fake, k, **kw)
    return [found[name]["value"] for name in ("precision", "recall", "density", "coverage")]


def by_hand(real, fake, k):
    def radius(points, i):
        return sorted(np.linalg.norm(points - points[i], axis=1))[k]

    inside = [[np.linalg.norm(f - r) < radius(real, i) for f in fake] for i, r in enumerate(real)]
    recalled = [
        any(np.linalg.norm(f - r) < radius(fake, j) for j, f in enumerate(fake)) for r in real
    ]
    inside = np.array(inside)
    return [inside.any(0).mean(), np.mean(recalled), inside.sum(0).mean() / k, inside.any(1).mean()]


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_equals_counting_by_hand(block):
    real, fake = gaussians(30, 3, 100.0), 0.7 * gaussians(24, 3, seed=1) + 100.5
    expected = by_hand(real, fake, 3)
    assert 0 < min(expected) < 1
    assert values(real, fake, 3, block=block) == pytest.approx(expected, abs=1e-12)


def test_identical_and_disjoint_sets():
    x = gaussians(60, 8)
    assert values(x, x) == pytest.approx([1, 1, 1, 1], abs=1e-12)
    assert values(x, x + 1e3) == [0, 0, 0, 0]


def test_dropped_mode_costs_recall_and_coverage_but_not_precision():
    real = np.concatenate([gaussians(200, 4), gaussians(200, 4, 50.0, seed=1)])
    precision, recall, density, coverage = values(real, gaussians(400, 4, seed=2))
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.03)
    assert coverage == pytest.approx(0.5, abs=0.03)
    assert density == pytest.approx(1, abs=0.1)  # it looks at the fakes, like precision


def test_same_distribution_meets_the_expectations():
    """Naeem et al. 2020, section 3.3: density 1, coverage 1 - 1/2^k."""
    found = np.array(
        [values(gaussians(300, 6, seed=s), gaussians(300, 6, seed=99 + s), 3) for s in range(8)]
    )
    assert found[:, 2].mean() == pytest.approx(1, abs=0.03)
    assert found[:, 3].mean() == pytest.approx(1 - 1 / 8, abs=0.02)


def test_figures_carry_sizes_and_intervals():
    found = prdc(gaussians(40, 3), gaussians(50, 3, 0.5, seed=1))
    assert {name: f["n"] for name, f in found.items()} == {
        "precision": 50, "density": 50, "recall": 40, "coverage": 40
    }  # fmt: skip
    assert all(f["low"] <= f["value"] <= f["high"] > f["low"] for f in found.values())


def test_too_few_points_are_refused():
    with pytest.raises(DataError, match="k = 5"):
        prdc(gaussians(5, 3), gaussians(50, 3))

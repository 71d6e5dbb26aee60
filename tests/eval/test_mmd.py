"""RBF-MMD: pair by pair, the Gaussians' closed form, CMMD's convention."""

import numpy as np
import pytest

from cnxs_jax.errors import ConfigError, DataError
from eval.metrics.mmd import cmmd, cmmd_interval, mmd_rbf


def gaussians(n, d, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def pairs(x, y, sigma):
    return np.array([[np.exp(-((a - b) ** 2).sum() / (2 * sigma**2)) for b in y] for a in x])


def test_equals_the_sum_over_pairs_whatever_the_block():
    x, y = gaussians(23, 5), gaussians(17, 5, 0.3, seed=1)
    xx, yy, xy = (pairs(*p, 1.7) for p in ((x, x), (y, y), (x, y)))
    expected = (xx.sum() - 23) / (23 * 22) + (yy.sum() - 17) / (17 * 16) - 2 * xy.mean()
    for block in (1, 7, 1024):
        assert mmd_rbf(x, y, 1.7, block).value == pytest.approx(expected, rel=1e-11)


def gaussian_mmd(d, shift, sigma):
    """E k(x, x') = r^(d/2) with r = sigma^2 / (sigma^2 + 2), times exp(-|shift|^2 / ...) across."""
    r = sigma**2 / (sigma**2 + 2)
    across = np.exp(-d * shift**2 / (2 * (sigma**2 + 2)))
    return 2 * r ** (d / 2) * (1 - across)


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_gaussians_meet_the_closed_form_and_its_coverage(shift):
    truth = gaussian_mmd(6, shift, 2.0)
    found = [
        mmd_rbf(gaussians(80, 6, seed=s), gaussians(70, 6, shift, seed=999 + s), 2.0)
        for s in range(200)
    ]
    values = np.array([f.value for f in found])
    assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values))
    assert np.mean([f.low <= truth <= f.high for f in found]) >= 0.92


def test_point_masses_and_disjoint_sets():
    x, y = np.zeros((5, 2)), np.tile([3.0, 4.0], (6, 1))
    assert mmd_rbf(x, y, 5.0).value == pytest.approx(2 - 2 * np.exp(-0.5))
    assert mmd_rbf(x, y * 1e3, 5.0).value == pytest.approx(2)


def test_cmmd_is_the_published_biased_estimate_on_unit_vectors():
    x, y = gaussians(31, 8, 1.0), gaussians(29, 8, 0.5, seed=1)
    a, b = (v / np.sqrt((v**2).sum(1))[:, None] for v in (x, y))
    means = [pairs(*p, 10.0).mean() for p in ((a, a), (b, b), (a, b))]
    expected = 1000 * (means[0] + means[1] - 2 * means[2])
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(5 * x, y / 3) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-10)
    opposite = np.tile([1.0, 0.0], (4, 1))  # |x - y|^2 = 4
    assert cmmd(opposite, -opposite) == pytest.approx(2000 * (1 - np.exp(-0.02)))


def test_cmmds_interval_covers_other_draws_of_the_same_sets():
    """Its value is biased upwards, so it covers other estimates of the same n, not 0."""
    intervals, values = [], []
    for seed in range(40):
        x, y = gaussians(60, 4, 1.0, seed=2 * seed), gaussians(60, 4, 0.4, seed=2 * seed + 1)
        values.append(cmmd(x, y))
        intervals.append(cmmd_interval(x, y))
    middle = np.mean(values)
    covered = [i["low"] <= middle <= i["high"] for i in intervals]
    assert 0.85 <= np.mean(covered) <= 1
    assert {(i["num_x"], i["num_y"]) for i in intervals} == {(60, 60)}
    wide = np.mean([i["high"] - i["low"] for i in intervals])
    assert wide == pytest.approx(2 * 1.96 * np.std(values), rel=0.4)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="sigma"):
        mmd_rbf(gaussians(9, 4), gaussians(9, 4), 0.0)
    with pytest.raises(DataError, match="width"):
        cmmd(gaussians(9, 4), gaussians(9, 5))

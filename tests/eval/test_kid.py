"""KID: known answers, an independent computation pair by pair, and what its interval means."""

import numpy as np
import pytest

from cnxs_jax.errors import DataError
from eval.metrics.kid import kid, kid_subsets


def gaussians(n, d, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def slow_kid(x, y):
    """Every pair by hand."""

    def k(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1.0) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_equals_the_sum_over_pairs_whatever_the_block():
    x, y = gaussians(23, 5), gaussians(17, 5, 0.3, seed=1)
    expected = slow_kid(x, y)
    for block in (1, 7, 1024):
        assert kid(x, y, block).value == pytest.approx(expected, rel=1e-12)


def test_the_interval_is_the_jackknife_by_brute_force():
    x, y = gaussians(14, 4), gaussians(11, 4, 0.5, seed=1)
    left_x = np.array([slow_kid(np.delete(x, i, 0), y) for i in range(14)])
    left_y = np.array([slow_kid(x, np.delete(y, i, 0)) for i in range(11)])
    variance = 13 / 14 * ((left_x - left_x.mean()) ** 2).sum()
    variance += 10 / 11 * ((left_y - left_y.mean()) ** 2).sum()
    result = kid(x, y)
    assert result.stderr == pytest.approx(np.sqrt(variance), rel=1e-9)
    assert result.high - result.value == pytest.approx(1.96 * np.sqrt(variance), rel=1e-3)


def test_population_value_of_point_masses():
    """All x at a, all y at b: k(a, a) + k(b, b) - 2 k(a, b) exactly."""
    a, b = np.array([1.0, 1.0]), np.array([2.0, 0.0])
    result = kid(np.tile(a, (5, 1)), np.tile(b, (6, 1)))
    assert result.value == pytest.approx(2**3 + 3**3 - 2 * 2**3)
    assert result.stderr == pytest.approx(0, abs=1e-12)


def test_same_distribution_is_unbiased_and_covered():
    """Mean zero over repetitions (a V-statistic would be 4 / n off), zero inside the intervals."""
    results = [kid(gaussians(60, 8, seed=s), gaussians(50, 8, seed=1000 + s)) for s in range(200)]
    values = np.array([r.value for r in results])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert np.mean([r.low <= 0 <= r.high for r in results]) >= 0.93


def mean_kernel(mu, nu):
    """E[(<x, y> / d + 1)^3] for x ~ N(mu, I), y ~ N(nu, I), from the Gaussian's moments."""
    d, m, mm, nn = len(mu), mu @ nu, mu @ mu, nu @ nu
    second = m**2 + mm + nn + d
    third = m**3 + 3 * m * nn + 3 * m * (mm + d + 2)
    return third / d**3 + 3 * second / d**2 + 3 * m / d + 1


def test_shifted_gaussian_meets_its_population_value_and_coverage():
    d, c = 6, 0.7
    zero, shift = np.zeros(d), np.full(d, c)
    truth = mean_kernel(zero, zero) + mean_kernel(shift, shift) - 2 * mean_kernel(zero, shift)
    results = [kid(gaussians(80, d, seed=s), gaussians(80, d, c, seed=999 + s)) for s in range(200)]
    values = np.array([r.value for r in results])
    assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values))
    assert 0.90 <= np.mean([r.low <= truth <= r.high for r in results]) <= 0.99


def test_subsets_agree_with_the_full_estimate():
    x, y = gaussians(300, 16), gaussians(300, 16, 0.2, seed=1)
    mean, spread = kid_subsets(x, y, subset_size=100, num_subsets=200)
    assert mean == pytest.approx(kid(x, y).value, abs=4 * spread / np.sqrt(200))
    whole, none = kid_subsets(x, y, subset_size=300, num_subsets=3)
    assert whole == pytest.approx(kid(x, y).value, rel=1e-9)
    assert none == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (gaussians(2, 4), gaussians(9, 4)),
        (gaussians(9, 4), gaussians(9, 5)),
        (gaussians(9, 4), np.full((9, 4), np.nan)),
        (np.zeros((0, 4)), gaussians(9, 4)),
    ],
)
def test_bad_features_are_refused(x, y):
    with pytest.raises(DataError):
        kid(x, y)


def test_subset_larger_than_the_sample_is_refused():
    with pytest.raises(DataError, match="subset_size"):
        kid_subsets(gaussians(9, 4), gaussians(9, 4), subset_size=10)

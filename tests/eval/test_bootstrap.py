"""Intervals: what they cover, and that pictures, not items, are drawn again."""

import numpy as np
import pytest

from cnxs_jax.errors import DataError
from eval.metrics import bootstrap


def test_mean_covers_the_truth_and_has_the_right_width():
    rng = np.random.default_rng(0)
    found = [bootstrap.mean(rng.exponential(2.0, 120), 300, seed=s) for s in range(200)]
    assert 0.89 <= np.mean([f["low"] <= 2 <= f["high"] for f in found]) <= 0.98
    width = np.mean([f["high"] - f["low"] for f in found])
    assert width == pytest.approx(2 * 1.96 * 2 / np.sqrt(120), rel=0.06)
    assert all(f["low"] <= f["value"] <= f["high"] and f["n"] == 120 for f in found)


def test_items_of_one_picture_count_as_one():
    """Ten equal items a picture: the interval is that of the pictures."""
    right = np.random.default_rng(0).integers(0, 2, 100)
    one = bootstrap.mean(right)
    ten = bootstrap.ratio(10 * right, np.full(100, 10))
    assert (ten["value"], ten["low"], ten["high"]) == pytest.approx(
        (one["value"], one["low"], one["high"])
    )
    assert (one["n"], ten["n"]) == (100, 1000)


def test_a_statistic_is_drawn_as_the_mean_is():
    values = np.random.default_rng(0).normal(size=80)
    own, mean = bootstrap.statistic(np.mean, values, 4000), bootstrap.mean(values, 4000)
    assert own["value"] == pytest.approx(mean["value"])
    assert own["low"] == pytest.approx(mean["low"], abs=0.02)
    assert own["high"] == pytest.approx(mean["high"], abs=0.02)


def test_proportion_is_wilsons():
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611."""
    figure = bootstrap.proportion(81, 263)
    assert (figure["low"], figure["high"]) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert bootstrap.wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_intervals_are_scipys():
    """Percentile bootstrap and Wilson's score interval."""
    from scipy import stats

    values = np.random.default_rng(3).gamma(2.0, size=150)
    figure = bootstrap.mean(values, resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile",
                             rng=np.random.default_rng(1)).confidence_interval  # fmt: skip
    assert (figure["low"], figure["high"]) == pytest.approx(tuple(theirs), rel=0.01)
    exact = stats.binomtest(37, 120).proportion_ci(method="wilson")
    assert bootstrap.wilson(37, 120) == pytest.approx((exact.low, exact.high), rel=1e-10)


@pytest.mark.parametrize("bad", [[], [1.0, np.inf], [np.nan], [[1.0, 2.0]]])
def test_values_without_an_interval_are_refused(bad):
    with pytest.raises(DataError):
        bootstrap.mean(bad)

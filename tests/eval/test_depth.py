"""Depth figures: known errors, invariances, and the order against all pairs."""

import itertools

import numpy as np
import pytest

from cnxs_jax.errors import ConfigError, DataError
from eval.metrics import depth


def maps(seed=0, n=2):
    return np.random.default_rng(seed).normal(size=(n, 8, 9))


def test_error_of_a_constant_difference_is_in_the_references_units():
    a = maps()
    found = depth.depth_error(a + 3, a)
    assert found["mae"] == pytest.approx([3, 3])
    assert found["mse"] == pytest.approx([9, 9])
    assert found["rmse"] == pytest.approx([3, 3])


def test_alignment_forgives_scale_and_shift_of_each_map_alone():
    a = maps()
    moved = a * np.array([2.0, -0.1])[:, None, None] + np.array([5.0, 7.0])[:, None, None]
    assert depth.depth_error(moved, a, "scale_shift")["rmse"] == pytest.approx([0, 0], abs=1e-12)
    noisy = maps(1)
    expected = [
        np.sqrt(np.linalg.lstsq(np.stack([m.ravel(), np.ones(72)], 1), t.ravel())[1][0] / 72)
        for m, t in zip(noisy, a, strict=True)
    ]
    assert depth.depth_error(noisy, a, "scale_shift")["rmse"] == pytest.approx(expected)
    flat = depth.depth_error(np.ones_like(a), a, "scale_shift")["rmse"]
    assert flat == pytest.approx(a.std((1, 2)))


def test_order_of_known_maps():
    a = maps()
    assert (depth.order_accuracy(np.exp(a), a) == 1).all()
    assert (depth.order_accuracy(-a, a) == 0).all()
    assert (depth.order_accuracy(np.zeros_like(a), a) == 0.5).all()
    assert np.isnan(depth.order_accuracy(a, np.zeros_like(a))).all()


def test_order_estimates_the_fraction_over_all_pairs():
    """A small near object on a wide background, and a detector that is partly wrong."""
    reference = np.zeros((1, 10, 10))
    reference[0, 2:4, 2:4], reference[0, 6:8, 5:9] = 2, 1
    found = reference + np.random.default_rng(0).normal(size=reference.shape)
    right = [
        (f[0] - f[1]) * (r[0] - r[1]) > 0
        for f, r in zip(
            itertools.combinations(found.ravel(), 2),
            itertools.combinations(reference.ravel(), 2),
            strict=True,
        )
        if r[0] != r[1]
    ]
    expected = np.mean(right)
    assert 0.6 < expected < 0.95
    accuracy = depth.order_accuracy(found, reference, 40_000)[0]
    assert accuracy == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(40_000))


def test_every_pair_of_pixels_weighs_the_same():
    """Levels of 60, 20 and 20 pixels, the last two swapped: 400 of 2800 pairs are wrong."""
    reference = np.repeat([0, 1, 2], [60, 20, 20]).reshape(1, 10, 10)
    found = np.array([0, 2, 1])[reference]
    expected = 2400 / 2800
    margin = 4 * np.sqrt(expected * (1 - expected) / 40_000)
    assert depth.order_accuracy(found, reference, 40_000)[0] == pytest.approx(expected, abs=margin)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="scale_shift"):
        depth.depth_error(maps(), maps(), "affine")
    with pytest.raises(DataError, match="finite"):
        depth.depth_error(maps(), np.full((2, 8, 9), np.nan))
    with pytest.raises(DataError, match="paired"):
        depth.order_accuracy(maps(), maps(n=3))

"""Agreement: known answers."""

import numpy as np
import pytest

from cnxs_jax.errors import DataError
from eval.metrics import agreement


def flat(value):
    return np.full((2, 8, 8, 3), value, np.uint8)


def test_rmse_and_psnr_of_a_constant_difference():
    figures = agreement.pixel_agreement(flat(100), flat(151))
    assert figures["rmse"]["value"] == pytest.approx(0.2)
    assert figures["psnr"]["value"] == pytest.approx(20 * np.log10(5))
    assert [f["n"] for f in figures.values()] == [2, 2]
    same = agreement.pixel_agreement(flat(7), flat(7))
    assert same["rmse"]["value"] == 0
    assert same["psnr"] == {"value": float("inf"), "n": 2}  # and no interval


def test_sharpness_sees_contrast_and_blur():
    real = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    figure = agreement.sharpness(real, real)
    assert figure["value"] == pytest.approx(1)
    assert figure["low"] < 1 < figure["high"]
    assert agreement.sharpness(real // 2, real)["value"] == pytest.approx(0.25, rel=0.03)
    blurred = (real.astype(int) + np.roll(real, 1, 1) + np.roll(real, 1, 2)) // 3
    assert agreement.sharpness(blurred.astype(np.uint8), real)["value"] < 0.5


def test_gradient_energy_of_an_edge():
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[:, :, 2:] = 255  # 4 of 12 horizontal differences are 1, no vertical one
    assert agreement.gradient_energy(image)[0] == pytest.approx(1 / 3)


def test_verdict_agreement_counts_items():
    a = [{"x": True, "y": False}, {"x": True}]
    b = [{"x": True, "y": True}, {"x": True}]
    figure = agreement.verdict_agreement(a, b)
    assert figure["value"] == pytest.approx(2 / 3)
    assert figure["n"] == 3


def test_unpaired_images_are_refused():
    with pytest.raises(DataError, match="paired"):
        agreement.pixel_agreement(flat(0), flat(0)[:1])
    with pytest.raises(DataError, match="paired"):
        agreement.verdict_agreement([], [])
    with pytest.raises(DataError, match="uint8"):
        agreement.gradient_energy(np.zeros((0, 8, 8, 3), np.uint8))

"""SSIM and PSNR: known answers; scikit-image's figures are in tests/parity."""

import numpy as np
import pytest

from cnxs_jax.errors import DataError
from eval.metrics import images


def flat(value):
    return np.full((2, 16, 20, 3), value, np.uint8)


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (2, 24, 20, 3), dtype=np.uint8)


def test_psnr_of_a_constant_difference():
    assert images.psnr(flat(100), flat(151)) == pytest.approx([20 * np.log10(5)] * 2)
    assert np.isinf(images.psnr(flat(7), flat(7))).all()


def test_ssim_of_flat_pictures_is_the_luminance_term():
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 151 + c1) / (100**2 + 151**2 + c1)
    assert images.ssim(flat(100), flat(151)) == pytest.approx([expected] * 2, rel=1e-9)


def test_ssim_of_identical_and_inverted_pictures():
    x = noise()
    assert images.ssim(x, x) == pytest.approx([1, 1], abs=1e-12)
    assert (images.ssim(x, 255 - x) < -0.8).all()


def test_ssim_is_symmetric_and_each_pictures_own():
    x, y = noise(), noise(1)
    both = images.ssim(x, y)
    assert both == pytest.approx(images.ssim(y, x))
    assert both[1:] == pytest.approx(images.ssim(x[1:], y[1:]))


def test_bad_pictures_are_refused():
    with pytest.raises(DataError, match="window"):
        images.ssim(noise()[:, :10], noise()[:, :10])
    with pytest.raises(DataError, match="paired"):
        images.psnr(noise(), noise()[:1])
    with pytest.raises(DataError, match="uint8"):
        images.ssim(noise() / 255, noise() / 255)

"""SSIM, PSNR, RMSE and Hausdorff distance against scikit-image on the same pictures."""

import numpy as np
import pytest
from skimage.feature import canny
from skimage.metrics import (
    hausdorff_distance,
    mean_squared_error,
    peak_signal_noise_ratio,
    structural_similarity,
)

from eval.metrics import agreement, edges, images

pytestmark = pytest.mark.parity


def pictures():
    """Smooth pictures, one with noise and one that is brighter, of odd size."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:45, :62] / 9
    base = np.stack([np.sin(x + k) * np.cos(y * (k + 1)) for k in range(3)], -1) * 80 + 120
    other = [base + rng.normal(0, 12, base.shape), 0.8 * base + 60]
    return [np.clip(np.round(v), 0, 255).astype(np.uint8) for v in ([base, base], other)]


def test_ssim_and_psnr_equal_scikit_images():
    a, b = pictures()
    ssim = [
        structural_similarity(p, q, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                              use_sample_covariance=False)
        for p, q in zip(a, b, strict=True)
    ]  # fmt: skip
    assert images.ssim(a, b) == pytest.approx(ssim, rel=1e-10)
    psnr = [peak_signal_noise_ratio(p, q) for p, q in zip(a, b, strict=True)]
    assert images.psnr(a, b) == pytest.approx(psnr, rel=1e-12)
    assert 0.2 < min(ssim) < max(ssim) < 0.99


def test_rmse_equals_scikit_images():
    a, b = pictures()
    rmse = [np.sqrt(mean_squared_error(p, q)) / 255 for p, q in zip(a, b, strict=True)]
    figure = agreement.pixel_agreement(np.stack(a), np.stack(b))["rmse"]
    assert figure["value"] == pytest.approx(np.mean(rmse), rel=1e-12)


def test_hausdorff_equals_scikit_images():
    a, b = ([canny(p.mean(-1), sigma=1.0) for p in side] for side in pictures())
    theirs = [hausdorff_distance(p, q) for p, q in zip(a, b, strict=True)]
    assert edges.hausdorff(np.stack(a), np.stack(b)) == pytest.approx(theirs, rel=1e-12)
    assert max(theirs) > 2

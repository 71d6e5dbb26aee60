"""SSIM and PSNR against scikit-image on the same pictures."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from eval.metrics import images

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

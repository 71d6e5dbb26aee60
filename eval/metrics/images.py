"""SSIM and PSNR of paired pictures, one figure a picture, float64 on the host."""

import numpy as np

from cnxs_jax.errors import DataError
from eval.metrics import inputs

PEAK = 255.0
SIGMA, RADIUS = 1.5, 5  # an 11 x 11 Gaussian window
K1, K2 = 0.01, 0.03


def psnr(images, reference):
    """Peak signal-to-noise ratio in dB `[N]` of paired uint8 pictures `[N, H, W, 3]`.

    Identical pictures have an infinite one, of which no mean with an interval can be taken.

    Raises:
        DataError: pictures that are not paired or not uint8.
    """
    a, b = inputs.image_pairs(images, reference, "psnr")
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / ((a - b) ** 2).mean((1, 2, 3)))


def ssim(images, reference):
    """Structural similarity `[N]`, in [-1, 1], of paired uint8 pictures `[N, H, W, 3]`.

    Wang et al. 2004, "Image Quality Assessment", section III.B, with its Gaussian window (sigma
    1.5, 11 x 11, population covariance), averaged over the windows inside the picture and over the
    channels: scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False)`.

    Raises:
        DataError: pictures that are not paired, not uint8 or smaller than the window.
    """
    a, b = inputs.image_pairs(images, reference, "ssim")
    if min(a.shape[1:3]) <= 2 * RADIUS:
        raise DataError(f"pictures of {a.shape[1:3]} are smaller than the window", "ssim")
    return np.array([_ssim(x, y) for x, y in zip(a, b, strict=True)])


def _ssim(a, b):
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    cov = _blur(a * b) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * cov + c2) / (var_a + var_b + c2)).mean()


def _blur(x):
    """Gaussian means of all windows inside: `[H, W, C]` -> `[H - 10, W - 10, C]`."""
    weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    weights /= weights.sum()
    height, width = (n - 2 * RADIUS for n in x.shape[:2])
    x = sum(w * x[i : i + height] for i, w in enumerate(weights))
    return sum(w * x[:, i : i + width] for i, w in enumerate(weights))

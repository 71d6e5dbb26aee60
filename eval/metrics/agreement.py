"""How close a student comes to its teacher for the same prompts and noise, and how sharp both are.

Pixel distances credit blur, so a sharpness figure and the checker's verdicts stand beside them.
"""

import numpy as np

from cnxs_jax.errors import DataError
from eval.metrics import inputs

LUMA = np.array([0.299, 0.587, 0.114])


def pixel_agreement(images, reference):
    """Mean RMSE (in [0, 1] units) and PSNR (dB, of the mean squared error) of paired images.

    Args:
        images, reference: uint8 `[N, H, W, 3]`, paired.

    Returns:
        {"rmse": mean over images, "psnr": dB}; identical images have an infinite PSNR.
    """
    a, b = inputs.image_pairs(images, reference, "agreement")
    squared = (((a - b) / 255.0) ** 2).mean((1, 2, 3))
    mean = squared.mean()
    psnr = float("inf") if mean == 0 else float(-10 * np.log10(mean))
    return {"rmse": float(np.sqrt(squared).mean()), "psnr": psnr}


def gradient_energy(images):
    """Mean squared forward difference of the luminance (in [0, 1] units), one figure an image."""
    luma = inputs.images(images, "agreement").astype(np.float64) @ LUMA / 255.0
    down, right = np.diff(luma, axis=1), np.diff(luma, axis=2)
    return (down**2).mean((1, 2)) + (right**2).mean((1, 2))


def sharpness(images, real):
    """Gradient energy relative to real images: 1 is as sharp as real, below 1 is blurred."""
    return float(gradient_energy(images).mean() / gradient_energy(real).mean())


def verdict_agreement(verdicts, reference):
    """Fraction of applicable items on which the checker says the same of both images.

    Args:
        verdicts, reference: lists of {item: bool} for the same prompts.
    """
    if len(verdicts) != len(reference) or not verdicts:
        raise DataError(
            f"verdicts must be paired, got {len(verdicts)} and {len(reference)}", "agreement"
        )
    same = [v[k] == r[k] for v, r in zip(verdicts, reference, strict=True) for k in r]
    return float(np.mean(same))

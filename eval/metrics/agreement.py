"""How close a student comes to its teacher for the same prompts and noise, and how sharp both are.

Every figure has an interval (`bootstrap`). Pixel distances credit blur, so a sharpness figure and
the checker's verdicts stand beside them.
"""

import numpy as np

from cnxs_jax.errors import DataError
from eval.metrics import bootstrap, inputs
from eval.metrics import images as quality

LUMA = np.array([0.299, 0.587, 0.114])


def pixel_agreement(images, reference):
    """RMSE (in [0, 1] units) and PSNR (dB) of paired images, means over pictures.

    Args:
        images, reference: uint8 `[N, H, W, 3]`, paired.

    Returns:
        {"rmse": figure, "psnr": figure}; with identical pictures the PSNR is infinite.
    """
    a, b = inputs.image_pairs(images, reference, "agreement")
    rmse = np.sqrt((((a - b) / 255.0) ** 2).mean((1, 2, 3)))
    psnr = quality.psnr(images, reference)
    return {"rmse": bootstrap.mean(rmse), "psnr": mean_or_infinite(psnr)}


def mean_or_infinite(values):
    """`bootstrap.mean`; where a value is infinite so is the mean, and it has no interval."""
    if np.isposinf(values).any():
        return {"value": float("inf"), "n": len(values)}
    return bootstrap.mean(values)


def gradient_energy(images):
    """Mean squared forward difference of the luminance (in [0, 1] units), one figure an image."""
    luma = inputs.images(images, "agreement").astype(np.float64) @ LUMA / 255.0
    down, right = np.diff(luma, axis=1), np.diff(luma, axis=2)
    return (down**2).mean((1, 2)) + (right**2).mean((1, 2))


def sharpness(images, real):
    """Gradient energy relative to real images: 1 is as sharp as real, below 1 is blurred.

    The interval is over the images, with the real ones as they are.
    """
    scale = gradient_energy(real).mean()
    return bootstrap.mean(gradient_energy(images) / scale)


def verdict_agreement(verdicts, reference):
    """Fraction of applicable items on which the checker says the same of both images.

    Args:
        verdicts, reference: lists of {item: bool} for the same prompts.
    """
    if len(verdicts) != len(reference) or not verdicts:
        raise DataError(
            f"verdicts must be paired, got {len(verdicts)} and {len(reference)}", "agreement"
        )
    pairs = list(zip(verdicts, reference, strict=True))
    return bootstrap.ratio(
        [sum(v[k] == r[k] for k in r) for v, r in pairs], [len(r) for _, r in pairs]
    )

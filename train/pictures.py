"""Pictures in a grid."""

import numpy as np

from cnxs_jax.errors import NumericsError


def to_uint8(x):
    """[-1, 1] -> uint8.

    Raises:
        NumericsError: NaN or infinity, which a clamp would make black.
    """
    bad = int(np.size(x) - np.isfinite(x).sum())
    if bad:
        raise NumericsError(
            f"{bad} of {np.size(x)} values are NaN or infinity",
            "pictures",
            "lower optimizer.learning_rate, then go on from the last checkpoint with --resume",
        )
    return np.round(np.clip((x + 1.0) * 127.5, 0, 255)).astype(np.uint8)


def grid(images, columns):
    """uint8 [N,H,W,3] -> [rows*H, columns*W, 3], the last row filled with white."""
    missing = -len(images) % columns
    white = np.full((missing, *images.shape[1:]), 255, np.uint8)
    tiles = np.concatenate([images, white])
    height, width = images.shape[1:3]
    tiles = tiles.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, columns * width, 3)

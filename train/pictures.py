"""Pictures in a grid."""

import numpy as np


def to_uint8(x):
    """[-1, 1] -> uint8, refusing what is not finite (a clamp would make it black)."""
    if not np.isfinite(x).all():
        raise FloatingPointError("pictures with NaN or infinity")
    return np.round(np.clip((x + 1.0) * 127.5, 0, 255)).astype(np.uint8)


def grid(images, columns):
    """uint8 [N,H,W,3] -> [rows*H, columns*W, 3], the last row filled with white."""
    missing = -len(images) % columns
    white = np.full((missing, *images.shape[1:]), 255, np.uint8)
    tiles = np.concatenate([images, white])
    height, width = images.shape[1:3]
    tiles = tiles.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, columns * width, 3)

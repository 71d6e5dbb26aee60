"""What the hints that a network draws have in common."""

import functools

import jax
import numpy as np

from cnxs_jax.errors import ConfigError


def check_pictures(images, where):
    """uint8 pictures [B,H,W,3] as a numpy array. Raises ConfigError for anything else."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        what = f"expected uint8 pictures [B,H,W,3], got {images.dtype} {list(images.shape)}"
        raise ConfigError(what, where)
    return images


@functools.cache
def opened(load, path):
    """`load(path) -> (module, params)` on the device, read once."""
    module, params = load(path)
    return module, jax.device_put(params)

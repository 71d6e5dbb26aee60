"""HED edges of pictures of any size. The weights are `cnxs_jax.convert.hed`'s."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.convert import hed as weights
from cnxs_jax.errors import ConfigError

SMALLEST = 256  # px: the detector has seen photographs, and finds nothing in thumbnails


@functools.partial(jax.jit, static_argnums=0)
def detect(module, params, images):
    """Edges float32 [B,H,W] in (0, 1) of uint8 pictures [B,H,W,3].

    Pictures with a side below `SMALLEST` are seen enlarged, and their edges averaged back.
    """
    x = images.astype(jnp.float32) / 255.0
    batch, height, width, _ = x.shape
    times = -(-SMALLEST // min(height, width))
    if times == 1:
        return module.apply({"params": params}, x)
    x = jax.image.resize(x, (batch, times * height, times * width, 3), "bilinear")
    edges = module.apply({"params": params}, x)
    return edges.reshape(batch, height, times, width, times).mean((2, 4))


@functools.cache
def _opened(path):
    module, params = weights.load(path)
    return module, jax.device_put(params)


def edges(images, path=None):
    """HED edges float32 [B,H,W], numpy, of uint8 pictures [B,H,W,3]; the weights are read once.

    Raises:
        ConfigError: no uint8 pictures.
        CheckpointError: as `convert.hed.load`.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        what = f"expected uint8 pictures [B,H,W,3], got {images.dtype} {list(images.shape)}"
        raise ConfigError(what, "hed")
    return np.asarray(detect(*_opened(str(weights.find(path))), images))

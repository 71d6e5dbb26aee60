"""HED edges of pictures of any size. The weights are `cnxs_jax.convert.hed`'s."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.control import annotators
from cnxs_jax.convert import hed as weights

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


def edges(images, path=None):
    """HED edges float32 [B,H,W], numpy, of uint8 pictures [B,H,W,3]; the weights are read once.

    Raises:
        ConfigError: no uint8 pictures.
        CheckpointError: as `convert.hed.load`.
    """
    images = annotators.check_pictures(images, "hed")
    module, params = annotators.opened(weights.load, str(weights.find(path)))
    return np.asarray(detect(module, params, images))

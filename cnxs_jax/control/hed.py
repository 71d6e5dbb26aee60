"""HED edges of pictures of any size. The weights are `cnxs_jax.convert.hed`'s."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.control import annotators
from cnxs_jax.convert import hed as weights

SMALLEST = 256  # px: the detector has seen photographs, and finds nothing in thumbnails
LONGEST = 4096  # px of the longer side to which a strip is enlarged at most
HALVED = 16  # px: the network halves a picture four times


def times_of(height, width):
    """How many times as high and as wide the network sees a picture, both at least 1.

    One with a side below `SMALLEST` is enlarged, as far as its longer side stays within `LONGEST`;
    a side below `HALVED` is stretched to that.
    """
    shorter, longer = sorted((height, width))
    times = max(min(-(-SMALLEST // shorter), LONGEST // longer), 1)
    return tuple(max(times, -(-HALVED // side)) for side in (height, width))


@functools.partial(jax.jit, static_argnums=0)
def detect(module, params, images):
    """Edges float32 [B,H,W] in (0, 1) of uint8 pictures [B,H,W,3].

    Small pictures are seen enlarged (`times_of`), and their edges averaged back.
    """
    x = images.astype(jnp.float32) / 255.0
    B, H, W, _ = x.shape
    high, wide = times_of(H, W)
    if high == wide == 1:
        return module.apply({"params": params}, x)
    x = jax.image.resize(x, (B, high * H, wide * W, 3), "bilinear")
    edges = module.apply({"params": params}, x)
    return edges.reshape(B, H, high, W, wide).mean((2, 4))


def edges(images, path=None):
    """HED edges float32 [B,H,W], numpy, of uint8 pictures [B,H,W,3]; the weights are read once.

    Raises:
        ConfigError: no uint8 pictures.
        CheckpointError: as `convert.hed.load`.
    """
    images = annotators.check_pictures(images, "hed")
    module, params = annotators.opened(weights.load, str(weights.find(path)))
    return np.asarray(detect(module, params, images))

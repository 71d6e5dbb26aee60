"""MiDaS depth of pictures of any size. The weights are `cnxs_jax.convert.midas`'s."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.control import annotators
from cnxs_jax.convert import midas as weights
from cnxs_jax.models.midas import MULTIPLE

# px of the shorter side: what the network was trained at, and what ControlNet-XS has at most.
SMALLEST, LARGEST = 384, 1024
LONGEST = 4096  # px of the longer side: a strip of a picture costs no more than a large picture


def size_of(height, width):
    """(height, width) at which the network sees a picture: its own, to multiples of 32.

    Smaller and larger ones than `SMALLEST` and `LARGEST` are scaled, their aspect kept; so are
    those whose longer side would have more than `LONGEST`.
    """
    shorter, longer = sorted((height, width))
    scale = min(min(max(shorter, SMALLEST), LARGEST) / shorter, LONGEST / longer)
    return tuple(max(round(scale * side / MULTIPLE), 1) * MULTIPLE for side in (height, width))


@functools.partial(jax.jit, static_argnums=0)
def estimate(module, params, images):
    """Depth float32 [B,H,W] in [0, 1] of uint8 pictures [B,H,W,3], nearer is brighter.

    Each picture's farthest point is 0 and its nearest 1; a picture without any depth is 0.
    """
    x = images.astype(jnp.float32) / 127.5 - 1.0
    B, H, W, _ = x.shape
    x = jax.image.resize(x, (B, *size_of(H, W), 3), "bilinear")
    depth = jax.image.resize(module.apply({"params": params}, x), (B, H, W), "bilinear")
    depth = depth - depth.min((1, 2), keepdims=True)
    most = depth.max((1, 2), keepdims=True)
    return jnp.clip(depth / jnp.where(most > 0, most, 1.0), 0.0, 1.0)


def depth(images, path=None):
    """MiDaS depth float32 [B,H,W] in [0, 1], numpy, of uint8 pictures [B,H,W,3].

    Nearer is brighter, as in the maps that ControlNet-XS's depth models were trained on; the
    weights are read once.

    Args:
        path: the network's weights, as in `convert.midas.load`. There are none without.

    Raises:
        ConfigError: no uint8 pictures.
        CheckpointError: as `convert.midas.load`.
    """
    images = annotators.check_pictures(images, "midas")
    module, params = annotators.opened(weights.load, str(weights.find(path)))
    return np.asarray(estimate(module, params, images))

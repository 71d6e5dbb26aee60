"""Holistically-nested edge detection (arXiv 1504.06375) in its two published forms.

A VGG16 whose five stages each give a map of edges at their own scale. PixArt-delta's detector
(`ControlNetHED.pth`) takes the mean of the five; the original network joins them by a learned
linear layer. Parameters carry the names of PixArt's file.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Channels and layers of the stages; between them the picture is halved by a maximum.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class HED(nn.Module):
    """`apply({"params": p}, x [B,H,W,3]) -> [B,H,W]` float32 in (0, 1): how likely an edge is.

    `x` is RGB in [0, 1].

    Args:
        fused: join the maps by the learned layer `fuse` instead of their mean. Sides that are odd
            are rounded up when they are halved, then, and not down.
        widths: channels of the first layers a stage, for tests; the published ones unless given.
    """

    fused: bool = False
    widths: tuple = tuple(width for width, _ in STAGES)

    @nn.compact
    def __call__(self, x):
        shape = x.shape[:3] + (1,)
        mean = self.param("norm", nn.initializers.zeros, (1, 3, 1, 1))  # PyTorch's [1,C,1,1]
        h, maps = 255.0 * x.astype(jnp.float32) - mean.reshape(1, 1, 1, 3), []
        for i, (width, (_, layers)) in enumerate(zip(self.widths, STAGES, strict=True)):
            if i:
                h = nn.max_pool(h, (2, 2), (2, 2), "SAME" if self.fused else "VALID")
            h, edges = Stage(width, layers, name=f"block{i + 1}")(h)
            maps.append(jax.image.resize(edges, shape, "bilinear"))
        maps = jnp.concatenate(maps, axis=-1)
        joined = nn.Conv(1, (1, 1), name="fuse")(maps)[..., 0] if self.fused else maps.mean(-1)
        return nn.sigmoid(joined)


class Stage(nn.Module):
    """Convolutions with ReLU, and the map [B,h,w,1] that a 1x1 convolution makes of them."""

    features: int
    layers: int

    @nn.compact
    def __call__(self, h):
        for i in range(self.layers):
            h = nn.relu(nn.Conv(self.features, (3, 3), padding=1, name=f"convs_{i}")(h))
        return h, nn.Conv(1, (1, 1), name="projection")(h)

"""Control pictures ("hints"): what a controller is shown, from pictures or from exact truth.

Every hint is a function `hint(arrays [B,H,W,...]) -> float32 [B,H,W,3] in [0, 1]` of numpy arrays,
three equal channels except for segmentation. `HINTS` says by name which key of a raw example it
reads: `canny`, `hed` and `midas` read pictures; the others read the exact truth of a scene, so that
control can be measured against what is known.
"""

from typing import Any, NamedTuple

import numpy as np

from cnxs_jax.control import annotators
from cnxs_jax.control import hed as detector
from cnxs_jax.control import midas as estimator
from cnxs_jax.convert import hed as hed_weights
from cnxs_jax.convert import midas as midas_weights
from cnxs_jax.errors import ConfigError, did_you_mean

# Training draws both thresholds from these ranges for each picture (ControlNet-XS's Canny models).
LOW_RANGE, HIGH_RANGE = (50, 100), (200, 350)
NEAREST = 3  # depth rank of the nearest object in a scene of three
PALETTE = np.array(
    [
        (0.0, 0.0, 0.0),
        (0.90, 0.10, 0.29),
        (0.24, 0.71, 0.29),
        (1.00, 0.88, 0.10),
        (0.26, 0.39, 0.85),
        (0.96, 0.51, 0.19),
        (0.57, 0.12, 0.71),
        (0.27, 0.94, 0.94),
        (0.94, 0.20, 0.90),
    ],
    np.float32,
)


class Hint(NamedTuple):
    """The key of a raw example that a hint reads, and its function.

    `weights`: of a hint that a network draws, the module of `convert` that reads them. Such a hint
    takes their `path`, which may be None where the module names a package that can hold them.
    """

    source: str
    draw: Any
    weights: Any = None


def line_art(edges):
    """Edge maps [B,H,W], bool or 0/1 -> white lines on black. Also of traced arrays."""
    return _three_channels((edges > 0).astype(np.float32))


def depth(ranks):
    """Depth ranks [B,H,W], 0 = background, larger = nearer -> nearer is brighter, as in MiDaS.

    Also of traced arrays.
    """
    return _three_channels(ranks.astype(np.float32) / np.float32(NEAREST))


def segmentation(labels):
    """Label maps [B,H,W] of whole numbers, 0 = background -> a colour each, from `PALETTE`."""
    labels = np.asarray(labels)
    if labels.min(initial=0) < 0:
        raise ConfigError(f"labels must be 0 or more, got {labels.min()}", "segmentation")
    # The background keeps its colour for itself; further labels go round.
    return PALETTE[np.where(labels > 0, 1 + (labels - 1) % (len(PALETTE) - 1), 0)]


def picture(example, name, rng=None, path=None):
    """The control picture uint8 [H,W,3] of a raw example.

    `rng` draws the thresholds of `canny`, `path` are the weights of `hed` and `midas`.
    """
    hint = named(name)
    given = label_map(example["masks"]) if hint.source == "labels" else example[hint.source]
    options = {} if hint.weights is None else {"path": path}
    if name == "canny":
        options = {"rng": rng}
    return np.round(255 * hint.draw(given[None], **options)[0]).astype(np.uint8)


def label_map(masks):
    """uint8 [H,W] of a scene's masks, bool [n,H,W]: 1 + the visible object, 0 = background."""
    numbers = np.arange(1, len(masks) + 1, dtype=np.uint8)
    return (np.asarray(masks, np.uint8) * numbers[:, None, None]).max(0, initial=0)


def hed(images, path=None):
    """HED edges (Xie & Tu 2015) of uint8 pictures [B,H,W,3], soft, white on black.

    Args:
        path: the detector's weights; those of an installed package unless given
            (`cnxs_jax.convert.hed`).

    Raises ConfigError and CheckpointError as `control.hed.edges` does.
    """
    return _three_channels(detector.edges(images, path))


def midas(images, path=None):
    """MiDaS depth (Ranftl et al. 2021, DPT-hybrid) of uint8 pictures [B,H,W,3], nearer is brighter.

    Each picture's values go from 0 to 1.

    Args:
        path: the network's weights (`cnxs_jax.convert.midas`); no package holds them.

    Raises ConfigError and CheckpointError as `control.midas.depth` does.
    """
    return _three_channels(estimator.depth(images, path))


def canny(images, low=100, high=200, rng=None):
    """Canny edges (Canny 1986) of uint8 pictures [B,H,W,3], as OpenCV computes them.

    Sobel gradients of each channel without smoothing, of each pixel the channel with the largest
    |dx| + |dy|; what is larger than its neighbours across the edge and above `low` is kept if it
    touches, through others like it, one above `high`.

    Args:
        low, high: thresholds of |dx| + |dy|.
        rng: a numpy Generator: both are drawn anew for each picture from `LOW_RANGE` and
            `HIGH_RANGE`, as in training.

    Raises:
        ConfigError: no uint8 pictures, or low above high.
    """
    images = annotators.check_pictures(images, "canny")
    if not 0 <= low <= high:
        raise ConfigError(f"thresholds need 0 <= low <= high, got {low} and {high}", "canny")
    edges = np.zeros(images.shape[:3], bool)
    for n, image in enumerate(images):
        if rng is not None:
            low, high = int(rng.integers(*LOW_RANGE)), int(rng.integers(*HIGH_RANGE))
        edges[n] = canny_edges(image, low, high)
    return line_art(edges)


def canny_edges(image, low, high):
    """Edges bool [H,W] of one uint8 picture [H,W,3]; see `canny`."""
    dx, dy = _sobel(image.astype(np.int32))
    strongest = (np.abs(dx) + np.abs(dy)).argmax(-1)[..., None]
    dx, dy = (np.take_along_axis(d, strongest, axis=-1)[..., 0] for d in (dx, dy))
    size = np.abs(dx) + np.abs(dy)
    ridge = (size > low) & _is_ridge(size, dx, dy)
    return _connected(ridge, ridge & (size > high))


def _sobel(image):
    """Horizontal and vertical Sobel derivatives [H,W,C], the border repeated."""
    p = np.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
    across = p[:, 2:] - p[:, :-2]
    down = p[2:] - p[:-2]
    dx = across[:-2] + 2 * across[1:-1] + across[2:]
    return dx, down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]


def _is_ridge(size, dx, dy):
    """Whether a pixel is larger than its two neighbours in the direction of the gradient.

    The direction is rounded to a multiple of 45 degrees by tan(22.5 deg) in fixed point. Of two
    equal neighbours the first one wins in straight directions; outside there is nothing.
    """
    p = np.pad(size, 1)

    def neighbour(y, x):
        return p[1 + y : p.shape[0] - 1 + y, 1 + x : p.shape[1] - 1 + x]

    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    low = x * int(0.4142135623730950488 * 2**15 + 0.5)
    flat, steep = y < low, y > low + (x << 16)
    across = (size > neighbour(0, -1)) & (size >= neighbour(0, 1))
    along = (size > neighbour(-1, 0)) & (size >= neighbour(1, 0))
    falling = (size > neighbour(-1, -1)) & (size > neighbour(1, 1))
    rising = (size > neighbour(-1, 1)) & (size > neighbour(1, -1))
    diagonal = np.where((dx < 0) != (dy < 0), rising, falling)
    return np.where(flat, across, np.where(steep, along, diagonal))


def _connected(weak, strong):
    """The pixels of `weak` that a path of neighbours (8 of them) joins to `strong`."""
    kept, front = strong.copy(), strong
    while front.any():
        p = np.pad(front, 1)
        rows = p[:, :-2] | p[:, 1:-1] | p[:, 2:]
        front = (rows[:-2] | rows[1:-1] | rows[2:]) & weak & ~kept
        kept |= front
    return kept


def _three_channels(values_BxHxW):
    """[B,H,W] -> [B,H,W,3], of numpy and of traced arrays alike."""
    return values_BxHxW[..., None] * np.ones((1, 1, 1, 3), np.float32)


HINTS = {
    "canny": Hint("image", canny),
    "hed": Hint("image", hed, hed_weights),
    "midas": Hint("image", midas, midas_weights),
    "lines": Hint("edges", line_art),
    "depth": Hint("depth", depth),
    "segmentation": Hint("labels", segmentation),
}


def named(name):
    """The `Hint` of this name. Raises ConfigError for any other."""
    if name not in HINTS:
        raise ConfigError(
            f"unknown hint {name!r}.{did_you_mean(name, HINTS)}",
            "hint",
            f"one of {', '.join(HINTS)}",
        )
    return HINTS[name]

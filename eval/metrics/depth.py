"""Depth of a picture against the depth that it was asked for: how far off, and in what order."""

import numpy as np

from cnxs_jax.errors import ConfigError, DataError
from eval.metrics import inputs

ALIGNMENTS = ("none", "scale_shift")


def depth_error(depth, reference, align="none"):
    """{"mae", "mse", "rmse"}, each `[N]`, of depth maps `[N, H, W]`, in the reference's units.

    Args:
        align: "scale_shift" first fits each map to its reference by least squares (Ranftl et al.
            2022, "Towards Robust Monocular Depth Estimation", equations (3) and (4), without
            trimming), for detectors that know depth only up to both.

    Raises:
        ConfigError: an unknown alignment.
        DataError: maps that are not paired `[N, H, W]` or not finite.
    """
    if align not in ALIGNMENTS:
        raise ConfigError(f"unknown alignment {align!r}", "depth_error", f"one of {ALIGNMENTS}")
    depth, reference = inputs.map_pairs(depth, reference, "depth_error", np.float64)
    if align == "scale_shift":
        depth = scale_shift(depth, reference)
    error = depth - reference
    mse = (error**2).mean((1, 2))
    return {"mae": np.abs(error).mean((1, 2)), "mse": mse, "rmse": np.sqrt(mse)}


def scale_shift(depth, reference):
    """Each map `[N, H, W]` scaled and shifted to its least-squares fit to the reference.

    A constant map becomes the reference's mean.
    """
    centre, target = (a.mean((1, 2), keepdims=True) for a in (depth, reference))
    covariance = ((depth - centre) * (reference - target)).mean((1, 2), keepdims=True)
    variance = ((depth - centre) ** 2).mean((1, 2), keepdims=True)
    scale = np.where(variance > 0, covariance / np.where(variance > 0, variance, 1), 0)
    return scale * (depth - centre) + target


def order_accuracy(depth, reference, num_pairs=10_000, seed=0):
    """Fraction `[N]` of pixel pairs whose order in depth is the reference's.

    Ordinal agreement (Chen et al. 2016, "Single-Image Depth Perception in the Wild", section 4) on
    random pairs of pixels with different reference depth; a tie counts one half, so a constant map
    has 1/2 and a reversed one 0. Any increasing function of the right depth has 1. NaN where the
    reference has no two depths.

    Raises:
        DataError: maps that are not paired `[N, H, W]` or not finite; no pairs.
    """
    depth, reference = inputs.map_pairs(depth, reference, "order_accuracy", np.float64)
    if num_pairs < 1:
        raise DataError(f"num_pairs must be positive, got {num_pairs}", "order_accuracy")
    rng = np.random.default_rng(seed)
    pairs = zip(depth, reference, strict=True)
    return np.array([_order(a.ravel(), b.ravel(), num_pairs, rng) for a, b in pairs])


def _order(depth, reference, num_pairs, rng):
    first, second = _pairs(reference, num_pairs, rng)
    if not len(first):
        return np.nan
    ours = np.sign(depth[first] - depth[second])
    theirs = np.sign(reference[first] - reference[second])
    return float(np.where(ours == 0, 0.5, ours == theirs).mean())


def _pairs(reference, num_pairs, rng):
    """Indices of pixel pairs with different values: each is a pixel and one of another depth.

    Drawn by rank, so that a small object on a wide background costs no rejected draws.
    """
    order = np.argsort(reference, kind="stable")
    _, starts, counts = np.unique(reference[order], return_index=True, return_counts=True)
    others = len(reference) - counts
    if len(counts) < 2:
        return np.empty(0, int), np.empty(0, int)
    weights = counts * others / (counts * others).sum()  # every unordered pair equally likely
    level = rng.choice(len(counts), num_pairs, p=weights)
    first = starts[level] + rng.integers(0, counts[level])
    second = rng.integers(0, others[level])
    second += np.where(second >= starts[level], counts[level], 0)  # steps over the own level
    return order[first], order[second]

"""How well the edges of a picture follow the edges that it was asked for.

Run one detector on the sample and on the reference (or take the exact edges of a scene) and compare
the maps here.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt

from cnxs_jax.errors import ConfigError, DataError
from eval.metrics import bootstrap, inputs


def edge_f1(edges, reference, tolerance=1.0):
    """{"precision", "recall", "f1"}, each `[N]`, of binary edge maps `[N, H, W]`.

    Boundary F1 (Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?",
    section 2): an edge pixel is right if the other map has one within `tolerance` pixels (Euclidean
    distance). It has no one-to-one matching, unlike BSDS, so double edges are forgiven. Two empty
    maps agree (1), an empty one and a drawn one do not (0).

    Raises:
        ConfigError: a negative tolerance.
        DataError: maps that are not paired `[N, H, W]`.
    """
    edges, reference = inputs.map_pairs(edges, reference, "edge_f1", bool)
    if not tolerance >= 0:
        raise ConfigError(f"the tolerance must not be negative, got {tolerance}", "edge_f1")
    precision = np.array([_near(a, b, tolerance) for a, b in zip(edges, reference, strict=True)])
    recall = np.array([_near(b, a, tolerance) for a, b in zip(edges, reference, strict=True)])
    total = precision + recall
    f1 = 2 * precision * recall / np.where(total > 0, total, 1)
    return {"precision": precision, "recall": recall, "f1": f1}


def figures(edges, reference, tolerance=1.0):
    """`edge_f1` averaged over pictures: {"edge_f1@1px": {"value", "low", "high", "n"}, ...}."""
    found = edge_f1(edges, reference, tolerance)
    return {f"edge_{k}@{tolerance:g}px": bootstrap.mean(v) for k, v in found.items()}


def hausdorff(edges, reference):
    """Hausdorff distance `[N]` in pixels: the worst distance from either map to the other.

    Raises:
        DataError: maps that are not paired `[N, H, W]`, or one without an edge.
    """
    edges, reference = inputs.map_pairs(edges, reference, "hausdorff", bool)
    if not (edges.any((1, 2)) & reference.any((1, 2))).all():
        raise DataError("a map has no edge, its distance is not defined", "hausdorff")
    pairs = zip(edges, reference, strict=True)
    return np.array([max(_distance(b)[a].max(), _distance(a)[b].max()) for a, b in pairs])


def soft_edge_distance(edges, reference):
    """Mean absolute difference `[N]` of soft edge maps in [0, 1], such as HED's, `[N, H, W]`.

    Raises:
        DataError: maps that are not paired, or with values outside [0, 1].
    """
    edges, reference = inputs.map_pairs(edges, reference, "soft_edge_distance", np.float64)
    if min(edges.min(), reference.min()) < 0 or max(edges.max(), reference.max()) > 1:
        raise DataError("soft edges must lie in [0, 1]", "soft_edge_distance", "divide by 255")
    return np.abs(edges - reference).mean((1, 2))


def _near(edges, reference, tolerance):
    """Fraction of the edge pixels that have an edge of `reference` within the tolerance."""
    if not edges.any():
        return float(not reference.any())
    if not reference.any():
        return 0.0
    # Distances are roots of whole numbers: the margin only undoes the root's rounding.
    return float((_distance(reference)[edges] <= tolerance + 1e-9).mean())


def _distance(edges):
    """Distance of every pixel to the nearest edge pixel."""
    return distance_transform_edt(~edges)

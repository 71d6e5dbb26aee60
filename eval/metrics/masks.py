"""Mask overlap: do objects and regions lie where the layout puts them?"""

import numpy as np

from cnxs_jax.errors import DataError
from eval.metrics import bootstrap, inputs


def mask_iou(masks, reference):
    """Intersection over union `[N]` of paired binary masks `[N, H, W]`; two empty ones have 1.

    Raises:
        DataError: masks that are not paired `[N, H, W]`.
    """
    masks, reference = inputs.map_pairs(masks, reference, "mask_iou", bool)
    both, either = (masks & reference).sum((1, 2)), (masks | reference).sum((1, 2))
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def mean_iou(labels, reference, num_classes):
    """Mean IoU of label maps `[N, H, W]`: {"value", "low", "high", "n", "classes"}.

    As segmentation benchmarks have it: pixels are counted over all pictures, then IoU a class, then
    the mean over the classes that occur; reference pixels outside 0..num_classes-1 are ignored.
    `classes` holds the IoU of each class, NaN where it does not occur; `n` counts pictures.

    Raises:
        DataError: maps that are not paired, or without a labelled pixel.
    """
    labels, reference = inputs.map_pairs(labels, reference, "mean_iou", np.int64)
    counts = np.array([_counts(*pair, num_classes) for pair in zip(labels, reference, strict=True)])
    if not counts.any():
        raise DataError("the reference has no pixel of any class", "mean_iou")
    figure = bootstrap.statistic(lambda c: np.nanmean(_class_iou(c)), counts)
    return figure | {"classes": _class_iou(counts)}


def _counts(labels, reference, num_classes):
    """(intersection, union) of each class, `[2, num_classes]`."""
    valid = (reference >= 0) & (reference < num_classes)
    labels, reference = labels[valid], reference[valid]
    known = (labels >= 0) & (labels < num_classes)
    both = np.bincount(reference[labels == reference], minlength=num_classes)
    total = np.bincount(reference, minlength=num_classes)
    total += np.bincount(labels[known], minlength=num_classes)
    return both, total - both


def _class_iou(counts):
    both, either = counts.sum(0)
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)

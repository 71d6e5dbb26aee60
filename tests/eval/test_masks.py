"""Mask overlap: rectangles of known overlap; classes that are absent, ignored or invented."""

import numpy as np
import pytest

from cnxs_jax.errors import DataError
from eval.metrics import masks


def box(x0, x1, n=1):
    out = np.zeros((n, 10, 10), int)
    out[:, :, x0:x1] = 1
    return out


def test_iou_of_boxes():
    assert masks.mask_iou(box(0, 6), box(4, 10)) == pytest.approx([0.2])
    assert masks.mask_iou(box(0, 4), box(0, 4)) == [1]
    assert masks.mask_iou(box(0, 4), box(4, 8)) == [0]
    assert masks.mask_iou(box(0, 0), box(0, 0)) == [1]


def test_mean_iou_counts_pixels_over_all_pictures():
    reference = np.concatenate([box(0, 5), box(0, 10)])  # class 1: 50 and 100 pixels
    labels = np.concatenate([box(0, 10), box(0, 10)])
    found = masks.mean_iou(labels, reference, 4)
    assert found["classes"][:2] == pytest.approx([0, 150 / 200])
    assert np.isnan(found["classes"][2:]).all()
    assert found["value"] == pytest.approx(0.375)
    assert found["n"] == 2


def test_invented_classes_cost_and_ignored_pixels_do_not():
    reference = box(0, 5)
    labels = np.where(reference == 0, 2, 1)
    assert masks.mean_iou(labels, reference, 3)["classes"] == pytest.approx([0, 1, 0])
    assert masks.mean_iou(np.where(reference == 0, 255, 1), reference, 3)["value"] == 0.5
    ignored = np.where(reference == 0, 255, 1)
    assert masks.mean_iou(labels, ignored, 3)["value"] == 1


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="paired"):
        masks.mask_iou(box(0, 3), box(0, 3, 2))
    with pytest.raises(DataError, match="no pixel"):
        masks.mean_iou(box(0, 3), np.full((1, 10, 10), 255), 3)

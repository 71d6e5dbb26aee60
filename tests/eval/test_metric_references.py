"""Metrics against scipy's functions on the same numbers, and distances of a set to itself."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist, cosine, jaccard
from scipy.stats import kendalltau

from eval.metrics import depth, edges, kid, masks, mmd, retrieval

RNG = np.random.default_rng(0)


def test_edge_f1_is_that_of_the_distances_of_all_points():
    a, b = RNG.random((2, 3, 24, 20)) < 0.05
    found = edges.edge_f1(a, b, 1.5)
    for n in range(3):
        apart = cdist(np.argwhere(a[n]), np.argwhere(b[n]))
        precision = (apart.min(1) <= 1.5).mean()
        recall = (apart.min(0) <= 1.5).mean()
        f1 = 2 / (1 / precision + 1 / recall)
        values = [found[k][n] for k in ("precision", "recall", "f1")]
        assert values == pytest.approx([precision, recall, f1], rel=1e-12)
    assert 0.1 < found["f1"].min() < 0.95


def test_mask_iou_is_jaccards():
    a, b = RNG.random((2, 4, 9, 9)) < 0.4
    expected = [1 - jaccard(p.ravel(), q.ravel()) for p, q in zip(a, b, strict=True)]
    assert masks.mask_iou(a, b) == pytest.approx(expected, rel=1e-12)


def test_depth_order_is_kendalls_tau_where_no_depths_are_equal():
    reference = RNG.normal(size=(2, 12, 12))
    found = reference + RNG.normal(size=(2, 12, 12))
    tau = [kendalltau(f, r).statistic for f, r in zip(found, reference, strict=True)]
    expected = (np.array(tau) + 1) / 2
    margin = 4 * 0.5 / np.sqrt(40_000)
    assert depth.order_accuracy(found, reference, 40_000) == pytest.approx(expected, abs=margin)


def test_clip_score_is_the_cosine_similarity_in_percent():
    a, b = RNG.normal(size=(2, 5, 7)) + 1
    expected = [100 * max(1 - cosine(p, q), 0) for p, q in zip(a, b, strict=True)]
    assert retrieval.clip_score(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["kid", "mmd"])
def test_a_set_beside_itself(name):
    """Unbiased estimates leave a picture's kernel with itself out of one term and in the other:
    2 / n times what is missing.
    """
    x = RNG.normal(size=(40, 6))
    kernels = {
        "kid": lambda: (x @ x.T / 6 + 1) ** 3,
        "mmd": lambda: np.exp(-(cdist(x, x) ** 2) / 8),
    }
    k = kernels[name]()
    off = (k.sum() - np.trace(k)) / (40 * 39)
    expected = 2 / 40 * (off - np.trace(k) / 40)
    found = {"kid": lambda: kid.kid(x, x), "mmd": lambda: mmd.mmd_rbf(x, x, 2.0)}[name]()
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert expected < 0

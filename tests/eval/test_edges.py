"""Edge figures: lines moved by known distances."""

import numpy as np
import pytest

from cnxs_jax.errors import ConfigError, DataError
from eval.metrics import edges


def line(column, size=16):
    out = np.zeros((1, size, size), bool)
    out[:, :, column] = True
    return out


def f1(a, b, tolerance=1.0):
    return edges.edge_f1(a, b, tolerance)["f1"][0]


def test_tolerance_is_a_euclidean_distance_in_pixels():
    assert f1(line(5), line(5), 0) == 1
    assert [f1(line(5), line(5 + d)) for d in (0, 1, 2)] == [1, 1, 0]
    assert f1(line(5), line(8), 3) == 1
    dot, diagonal = np.zeros((2, 1, 9, 9), bool)
    dot[0, 4, 4] = diagonal[0, 5, 5] = True
    assert [f1(dot, diagonal, t) for t in (1.0, 1.4, 2**0.5)] == [0, 0, 1]


def test_precision_and_recall_are_not_swapped():
    both = line(3) | line(12)
    found = edges.edge_f1(both, line(3))
    assert (found["precision"][0], found["recall"][0]) == (0.5, 1)
    assert found["f1"][0] == pytest.approx(2 / 3)
    assert edges.edge_f1(line(3), both)["recall"][0] == 0.5


def test_empty_maps():
    none = np.zeros_like(line(0))
    assert f1(none, none) == 1
    assert f1(none, line(3)) == 0
    assert f1(line(3), none) == 0


def test_figures_name_the_tolerance_and_average_pictures():
    maps = np.concatenate([line(3), line(3)])
    found = edges.figures(maps, np.concatenate([line(3), line(9)]), 2)
    assert found["edge_f1@2px"]["value"] == 0.5
    assert found["edge_f1@2px"]["n"] == 2
    assert set(found) == {"edge_precision@2px", "edge_recall@2px", "edge_f1@2px"}


def test_hausdorff_is_the_worst_distance_either_way():
    assert edges.hausdorff(line(3), line(7)) == 4
    far = line(3).copy()
    far[0, 0, 15] = True
    assert edges.hausdorff(far, line(3)) == 12
    assert edges.hausdorff(line(3), far) == 12


def test_hausdorff_equals_scipys_of_the_points():
    from scipy.spatial.distance import directed_hausdorff

    a, b = np.random.default_rng(0).random((2, 1, 20, 20)) < 0.02
    points = [np.argwhere(m[0]) for m in (a, b)]
    expected = max(directed_hausdorff(*points)[0], directed_hausdorff(*points[::-1])[0])
    assert edges.hausdorff(a, b)[0] == pytest.approx(expected)


def test_soft_edges():
    a = np.zeros((1, 4, 4))
    assert edges.soft_edge_distance(a, a + 0.25) == pytest.approx(0.25)
    with pytest.raises(DataError, match="255"):
        edges.soft_edge_distance(a, a + 25)


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="paired"):
        edges.edge_f1(line(3), line(3)[0])
    with pytest.raises(DataError, match="no edge"):
        edges.hausdorff(line(3), np.zeros_like(line(3)))
    with pytest.raises(ConfigError, match="tolerance"):
        edges.edge_f1(line(3), line(3), -1)

"""Control pictures: Canny against OpenCV's recorded map and by its properties, exact truth."""

import jax
import numpy as np
import pytest

from cnxs_jax.control import hints
from cnxs_jax.data import pipeline
from cnxs_jax.errors import ConfigError

# cv2.Canny(picture(), 100, 200) of OpenCV 5.0.0, packed; 80 further pictures and pairs of
# thresholds agreed with it in every pixel.
OPENCV = (
    "f810220c1023841042841042c4000136f3fc430c0240000384100284100244000278c3fe433c0346102184104284"
    "104240182270ff0ecb00d0820041841042841042fc1021441021"
)


def picture(seed=0, side=24):
    """Smooth coloured noise, uint8 [H,W,3]: edges of all directions and strengths."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (side // 6, side // 6, 3)).astype(np.float64)
    fine = np.kron(coarse, np.ones((6, 6, 1)))
    for axis in (0, 1):
        fine = (fine + np.roll(fine, 1, axis) + np.roll(fine, -1, axis)) / 3
    return fine.round().astype(np.uint8)


def lines(image, **thresholds):
    return hints.canny(image[None], **thresholds)[0, ..., 0] > 0


def test_edges_are_those_of_opencv():
    found = lines(picture(), low=100, high=200)
    assert np.packbits(found).tobytes().hex() == OPENCV


def test_a_step_is_one_line_of_one_pixel():
    image = np.zeros((9, 12, 3), np.uint8)
    image[:, 6:] = (0, 90, 0)  # one channel is enough: 4 * 90 = 360
    found = lines(image, low=100, high=300)
    assert found[:, 5].all()
    assert found.sum() == 9
    assert not lines(image, low=100, high=360).any()  # above, not at
    np.testing.assert_array_equal(lines(image.swapaxes(0, 1), low=100, high=300), found.T)


def test_weak_edges_live_where_they_touch_strong_ones():
    image = np.zeros((12, 24, 3), np.uint8)
    image[6:, :6], image[6:, 6:12], image[6:, 16:] = 120, 70, 70
    found = lines(image, low=200, high=450)  # the border of 120 to 0 is above, that of 70 is not
    assert found[5, :5].all()
    assert found[5, 7:11].all()  # joined to it
    assert not found[:, 13:].any()  # as strong, but on its own
    assert lines(image, low=200, high=250)[5, 17:].all()


def test_thresholds_are_drawn_for_each_picture():
    images = np.stack([picture()] * 8)
    drawn = hints.canny(images, rng=np.random.default_rng(3))
    assert drawn.dtype == np.float32
    assert len({drawn[n].tobytes() for n in range(8)}) > 1
    np.testing.assert_array_equal(drawn, hints.canny(images, rng=np.random.default_rng(3)))
    widest = hints.canny(images[:1], hints.LOW_RANGE[0], hints.HIGH_RANGE[0])
    assert (drawn <= widest).all()


def test_truth_of_scenes():
    source = pipeline.open_source("shapes", "train", 32, truth=True)
    scene = next(s for s in (source[i] for i in range(50)) if len(s["objects"]) == 3)
    scene["labels"] = hints.label_map(scene["masks"])
    made = {}
    for name, (key, draw, weights) in hints.HINTS.items():
        if weights is not None:  # tests/control/test_hed.py, test_midas.py
            continue
        made[name] = draw(scene[key][None])
        assert made[name].shape == (1, 32, 32, 3)
        assert made[name].dtype == np.float32
        assert 0 <= made[name].min() <= made[name].max() == 1.0 or name == "segmentation"
    np.testing.assert_array_equal(made["lines"][0, ..., 0] > 0, scene["edges"])
    for n, mask in enumerate(scene["masks"]):
        np.testing.assert_array_equal(scene["labels"] == n + 1, mask)
        colours = np.unique(made["segmentation"][0][mask], axis=0)
        np.testing.assert_array_equal(colours, hints.PALETTE[n + 1][None])
    nearest = max(range(3), key=lambda n: scene["objects"][n]["depth"])
    assert (made["depth"][0][scene["masks"][nearest]] == 1.0).all()
    assert (made["depth"][0][scene["labels"] == 0] == 0.0).all()


def test_truth_may_be_traced():
    edges = np.random.default_rng(0).random((2, 4, 5)) > 0.5
    np.testing.assert_array_equal(jax.jit(hints.line_art)(edges), hints.line_art(edges))
    ranks = np.random.default_rng(0).integers(0, 4, (2, 4, 5)).astype(np.uint8)
    np.testing.assert_allclose(jax.jit(hints.depth)(ranks), hints.depth(ranks), rtol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: hints.canny(np.zeros((4, 4, 3), np.uint8)),
        lambda: hints.canny(np.zeros((1, 4, 4, 3), np.float32)),
        lambda: hints.canny(np.zeros((1, 4, 4, 3), np.uint8), low=200, high=100),
        lambda: hints.segmentation(np.full((1, 2, 2), -1)),
        lambda: hints.named("cany"),
    ],
)
def test_bad_input(call):
    with pytest.raises(ConfigError):
        call()

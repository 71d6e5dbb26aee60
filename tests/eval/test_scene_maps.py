"""Maps read from scenes: known pictures, real scenes against their exact truth, what is moved."""

import numpy as np
import pytest

from cnxs_jax.data import emoji_scenes, scenes
from eval import measures, networks, plan
from eval.metrics import depth, masks, scene_maps

WORLD = emoji_scenes.world()


def plain(colour=(200, 220, 240)):
    return np.full((1, 32, 32, 3), colour, np.uint8)


def square(y, x, side=12, colour=(250, 20, 30)):
    out = plain()
    out[0, y : y + side, x : x + side] = colour
    return out


def test_a_square_is_the_foreground_and_its_border_the_edges():
    found = scene_maps.foreground(square(5, 8))[0]
    expected = np.zeros((32, 32), bool)
    expected[5:17, 8:20] = True
    assert (found == expected).all()
    assert not scene_maps.foreground(plain()).any()
    assert not scene_maps.edges(plain()).any()
    rows, columns = np.nonzero(scene_maps.edges(square(5, 8))[0])
    inner = (rows > 6) & (rows < 15) & (columns > 9) & (columns < 18)
    assert len(rows) >= 4 * 10
    assert not inner.any()


def test_control_figures_of_what_was_asked_for_and_of_something_else():
    """Real scenes are right; those of other prompts are not, and a square half off has IoU 1/3."""
    prompts = plan.prompts(WORLD, "test", 12, hint="lines")
    tools = networks.Tools()

    def figures(images):
        sample = measures.Sample(images, prompts, tools)
        names = ("control_edges", "control_masks")
        found = measures.figures(names, sample, None, None, tools)
        return {k: v["value"] for k, v in found.items()}

    own, others = figures(prompts.images), figures(np.roll(prompts.images, 1, 0))
    assert own["control_edge_f1@1px"] == 1
    assert own["control_mask_iou"] > 0.85
    assert others["control_edge_f1@1px"] < 0.5
    assert others["control_mask_iou"] < 0.5
    moved = masks.mask_iou(*(scene_maps.foreground(square(5, x)) for x in (8, 14)))
    assert moved == pytest.approx([6 / 18])


def test_control_metrics_need_a_controllers_run():
    found = plan.Plan("x", (), {"test": plan.prompts(WORLD, "test", 1)})
    assert not found.has["truth"]
    for name in measures.CONTROL:
        with pytest.raises(Exception, match="controller"):
            measures.check_needs((name,), found.has)
    shown = plan.prompts(WORLD, "test", 2, hint="depth")
    assert plan.Plan("x", (), {"test": shown}).has["truth"]
    assert shown.head(1).truth["hint"].shape == (1, 64, 64, 3)
    assert set(np.unique(shown.truth["hint"])) <= {0, 85, 170, 255}


def in_front(number):
    """Scenes of two objects, one in front of the other."""
    spec = {"count": 2, "relation": "in front of", "concepts": list(WORLD.concepts[:2])}
    return [scenes.make_scene(WORLD, seed, spec) for seed in range(number)]


def test_depth_of_real_scenes_is_read_from_their_sprites():
    found = in_front(6)
    images = np.stack([s["image"] for s in found])
    asked = np.stack([s["depth"] for s in found]).astype(np.float64)
    read = scene_maps.load_depth_reader()
    ranks = read(images, asked)
    assert depth.order_accuracy(ranks, asked).mean() > 0.95
    assert depth.depth_error(ranks, asked)["mse"].mean() < 0.1
    # Asked for the opposite order, what overlaps does not give way.
    swapped = np.where(asked > 0, 3 - asked, 0)
    assert depth.order_accuracy(read(images, swapped), swapped).mean() < 0.95


def test_what_does_not_overlap_takes_the_asked_order():
    """Two stacks of three poses: apart, either order is right; on each other only one."""
    picture, stack = _stack(left=(20, 90))
    asked = np.zeros((64, 64))
    shapes = [scene_maps._solid(picture, pose) for pose in stack]
    for ranks in ((1, 2), (2, 1)):
        asked[:] = 0
        for rank, shape in zip(ranks, shapes, strict=True):
            asked[shape] = rank
        assert (scene_maps.best_order(picture, stack, asked) == asked).all()
    picture, stack = _stack(left=(40, 44))
    back, front = (scene_maps._solid(picture, pose) for pose in stack)
    asked = np.where(back, 2.0, np.where(front, 1.0, 0.0))
    found = scene_maps.best_order(picture, stack, asked)
    assert (found[back & front] == 2).all()
    assert (found[back & ~front] == 1).all()


def _stack(left):
    """(an empty picture, two poses of the smallest sprites at these columns)."""
    from eval.metrics import scene_fit, scene_read

    sprites = scene_read.sprites_of(WORLD, 64)
    picture = scene_fit.Picture(np.full((64, 64, 3), 255, np.uint8), (255, 255, 255), sprites)
    limit = picture.target.shape[2] - sprites.side
    poses = [scene_fit.Pose(c, 0, 0, sprites.margin, min(x, limit)) for c, x in zip(
        WORLD.concepts, left, strict=False)]  # fmt: skip
    return picture, poses

"""The scene checker: right on ground truth, wrong where the picture is wrong; its arithmetic."""

import dataclasses

import numpy as np
import pytest

from cnxs_jax.data import emoji_scenes
from cnxs_jax.data.scenes import composite, make_scene
from cnxs_jax.errors import CheckpointError, ConfigError, DataError
from eval.metrics import scene_accuracy as sa
from eval.metrics import scene_checker, scene_read
from eval.metrics.scene_checker import Detection

WORLD = emoji_scenes.world()


@pytest.fixture(scope="module")
def read():
    return sa.load_checker()


def scene(**spec):
    spec.setdefault("named", {"style", "background", "relation"})
    return make_scene(WORLD, np.random.default_rng(5), spec, truth=False)


def truth(number):
    scenes = sa.real_scenes(WORLD, number, seed=77)
    return np.stack([s["image"] for s in scenes]), [sa.shown(s) for s in scenes]


@pytest.mark.parametrize("number", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_ground_truth_scenes_are_read_right(read, number):
    figures, _ = sa.score(read, *truth(number))
    assert figures["items"]["value"] >= 0.995
    assert figures["all_correct"]["value"] >= 0.98
    assert figures["extra_objects"]["value"] <= 0.02
    assert figures["items"]["chance"] <= 0.3
    assert figures["all_correct"]["chance"] <= 0.02


def test_blurred_scenes_are_read_right(read):
    images, prompts = truth(100)
    assert sa.score(read, sa.blur(images, 0.8), prompts)[0]["items"]["value"] >= 0.99


def test_the_command_reads_scenes_through_the_shipped_autoencoder(monkeypatch, capsys):
    seen, score = [], sa.score
    monkeypatch.setattr(sa, "score", lambda *args: seen.append(args[1]) or score(*args))
    sa.main(["--check", "--scenes=50"])
    plain, through = (images.astype(int) for images in seen)
    own, other = (np.abs(p - through).mean((1, 2, 3)) for p in (plain, np.roll(plain, 1, axis=0)))
    assert len(plain) == 50
    assert own.min() > 0.2  # a round trip: not the scene itself, and no other one
    assert (own < other).all()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ground truth", "through the VAE"]
    items = [float(line.split("'items': ")[1].split(",")[0]) for line in lines]
    assert min(items) >= 0.99
    with pytest.raises(ConfigError, match="0 scenes"):
        sa.main(["--check", "--scenes=0"])


def test_every_word_and_every_heldout_pair_is_known(read):
    """Each (concept, style) pair alone, so that no pair can hide in the average."""
    rng = np.random.default_rng(3)
    scenes = [
        make_scene(WORLD, rng, {"concepts": [c], "style": s}, truth=False)
        for c in WORLD.concepts
        for s in WORLD.styles
    ]
    figures, _ = sa.score(
        read, np.stack([s["image"] for s in scenes]), [sa.shown(s) for s in scenes]
    )
    assert figures["objects"]["value"] >= 0.99
    assert figures["style"]["value"] >= 0.99


def verdict(read, picture, prompt_of):
    found, backgrounds = read(picture["image"][None])
    return sa.judge(found[0], backgrounds[0], sa.shown(prompt_of))


def test_a_removed_object_is_missed(read):
    for concept in ("tiger", "rocket", "cactus"):
        whole = scene(concepts=["panda", concept], relation="left of", style="flat")
        part = scene(concepts=["panda"], background=whole["background"], style="flat")
        assert all(verdict(read, whole, whole).values())
        wrong = verdict(read, part, whole)
        assert {k for k, right in wrong.items() if right} == {"object 0", "style", "background"}


def test_a_swapped_object_is_missed(read):
    wanted = scene(concepts=["frog", "train"], relation="above")
    other = scene(concepts=["frog", "carrot"], relation="above")
    assert [verdict(read, other, wanted)[f"object {i}"] for i in (0, 1)] == [True, False]


@pytest.mark.parametrize("relation", ["left of", "above", "in front of"])
def test_a_swapped_relation_is_wrong(read, relation):
    right, wrong = (
        scene(concepts=c, relation=relation, style="cartoon")
        for c in (["panda", "train"], ["train", "panda"])
    )
    assert verdict(read, right, right)["relation"]
    assert not verdict(read, wrong, right)["relation"]


def test_flipping_the_depth_flips_the_order(read):
    """The same sprites at the same places, painted the other way round."""
    rng = np.random.default_rng(8)
    pairs = [("panda", "train"), ("frog", "carrot"), ("tiger", "rocket"), ("crab", "cactus")]
    for pair in pairs:
        picture = make_scene(WORLD, rng, {"concepts": list(pair), "relation": "in front of"})
        order = np.argsort([o["depth"] for o in picture["objects"]])[::-1]
        _, flipped = composite(WORLD, picture["objects"], order, picture["background"], 64)
        assert verdict(read, picture, picture)["relation"]
        assert not verdict(read, {"image": flipped}, picture)["relation"]


def test_each_object_keeps_its_own_style(read):
    """A generated picture may mix styles; the sprites are not forced to share one."""
    picture = scene(concepts=["panda", "train"], relation="left of", style="flat")
    objects = [dict(picture["objects"][0]), {**picture["objects"][1], "style": "3d"}]
    for o in objects:
        h, w = WORLD.solid(o).shape
        o["box"] = (o["box"][0], o["box"][1], o["box"][0] + w, o["box"][1] + h)
    _, image = composite(WORLD, objects, [0, 1], picture["background"], 64)
    found, _ = read(image[None])
    assert {d.concept: d.style for d in found[0]} == {"panda": "flat", "train": "3d"}


def test_a_sure_detection_stays_though_no_sprite_fits_unless_contradicted():
    image = scene(concepts=["panda"], background="blue")["image"]
    blue, sprites = WORLD.backgrounds["blue"], scene_read.sprites_of(WORLD, 64)
    plain = np.broadcast_to(np.uint8(blue), (64, 64, 3))
    sure, unsure = at("fox", 20, 20), dataclasses.replace(at("crab", 44, 44), score=0.2)
    assert scene_read.read_one(plain, [sure, unsure], blue, sprites) == [sure]
    (panda,) = sa.load_checker()(image[None])[0][0]
    rival = dataclasses.replace(panda, concept="train", score=0.5)
    read = scene_read.read_one(image, [panda, rival], blue, sprites)
    assert [d.concept for d in read] == ["panda"]


def test_another_style_or_background_is_wrong(read):
    for style in WORLD.styles:
        for background in WORLD.backgrounds:
            picture = scene(concepts=["tiger"], style=style, background=background)
            for other in WORLD.styles:
                prompt = {**sa.shown(picture), "style": other}
                found, backgrounds = read(picture["image"][None])
                assert sa.judge(found[0], backgrounds[0], prompt)["style"] == (style == other)
                assert backgrounds == [background]


def test_recolouring_the_background_changes_only_that_verdict(read):
    picture = scene(concepts=["penguin"], background="green")
    image = picture["image"].copy()
    plain = (image == np.array(WORLD.backgrounds["green"])).all(-1)
    image[plain] = WORLD.backgrounds["pink"]
    found, backgrounds = read(image[None])
    wrong = sa.judge(found[0], backgrounds[0], sa.shown(picture))
    assert wrong["object 0"]
    assert not wrong["background"]


def at(concept, y, x, style="flat", covered=0.0, size=24):
    return Detection(concept, style, y, x, size, covered, 0.9)


def prompt(*concepts, style=None, background=None, relation=None):
    words = {"style": style, "background": background, "relation": relation}
    return {"concepts": list(concepts), **words}


def test_only_what_is_prompted_is_judged():
    found = [at("fox", 20, 20)]
    assert sa.judge(found, "white", prompt("fox")) == {"object 0": True}
    full = sa.judge(found, "white", prompt("fox", style="3d", background="white"))
    assert full == {"object 0": True, "style": False, "background": True}
    assert not sa.judge([], "white", prompt("fox", style="flat"))["style"]


def test_duplicates_are_counted():
    two = prompt("fox", "fox")
    assert list(sa.judge([at("fox", 9, 9)], "white", two).values()) == [True, False]
    assert all(sa.judge([at("fox", 9, 9), at("fox", 40, 40)], "white", two).values())
    assert sa.extra_objects([at("fox", 9, 9), at("fox", 40, 40)], prompt("fox")) == 1


@pytest.mark.parametrize(
    ("kind", "second", "right"),
    [
        ("left of", at("b", 25, 45), True),
        ("left of", at("b", 45, 25), False),
        ("left of", at("b", 20, 5), False),
        ("above", at("b", 45, 25), True),
        ("above", at("b", 25, 45), False),
        ("in front of", at("b", 26, 30, covered=1.0), True),
        ("in front of", at("b", 26, 30), False),
        ("in front of", at("b", 60, 60, covered=1.0), False),
    ],
)
def test_relations_by_geometry(kind, second, right):
    assert sa.related(at("a", 20, 20), kind, second) == right
    assert not sa.related(None, kind, second)


def test_figures_of_known_verdicts():
    verdicts = [{"object 0": True, "object 1": False, "style": True}, {"object 0": True}] * 50
    figures = sa.summarise(verdicts)
    assert figures["objects"]["value"] == pytest.approx(2 / 3)
    assert figures["items"]["value"] == pytest.approx(3 / 4)
    assert figures["all_correct"]["value"] == 0.5
    assert figures["all_correct"]["low"] == pytest.approx(0.4038, abs=1e-4)  # Wilson, 50 of 100
    assert (figures["style"]["n"], figures["objects"]["n"]) == (50, 150)
    assert "relation" not in figures
    assert figures["objects"]["low"] < 2 / 3 < figures["objects"]["high"]


def test_missing_or_damaged_checker_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="--fit"):
        scene_checker.load(tmp_path)
    params, words = scene_checker.load(sa.CHECKER)
    scene_checker.save(tmp_path, params, words, {})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="no usable scene checker"):
        scene_checker.load(tmp_path)
    fewer = scene_checker.Vocabulary(words.concepts[1:], words.styles, words.backgrounds)
    scene_checker.save(tmp_path, params, fewer, {})
    with pytest.raises(CheckpointError, match="do not fit"):
        scene_checker.load(tmp_path)


def test_bad_input_is_refused(read):
    with pytest.raises(DataError, match="uint8"):
        read(np.zeros((0, 64, 64, 3), np.uint8))
    with pytest.raises(DataError, match="pictures for"):
        sa.score(read, np.zeros((1, 64, 64, 3), np.uint8), [])
    with pytest.raises(ConfigError, match="--fit"):
        sa.main([])


def test_the_checker_is_small():
    assert (sa.CHECKER / "model.safetensors").stat().st_size <= 1_000_000

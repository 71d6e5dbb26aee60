"""The studies of eDiff-I: real scenes as what was drawn, and a cascade of random networks."""

import dataclasses
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax.data import emoji_scenes
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.conditioning import MASKS, dropped
from cnxs_jax.models.style_words import StyleWords
from cnxs_jax.pipelines.load import save_model
from cnxs_jax.sample import DEFAULT_MODEL
from eval import ask, plan
from eval.ediffi import attention, encoders, experts, painting, style
from tests.pipelines.test_ediffi import drawn, pipe  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:caption has")


def scene(seed, **spec):
    return emoji_scenes.make_scene(np.random.default_rng(seed), spec, split="test", truth=False)


def test_a_thing_counts_where_its_half_was_painted():
    asked = [{"things": ("tiger", "carrot")}] * 6
    found = ask.seen(np.stack([
        scene(n, concepts=["tiger", "carrot"], relation="left of")["image"] for n in range(6)
    ]))  # fmt: skip
    verdicts = [painting.verdict(f, a["things"], 64) for f, a in zip(found, asked, strict=True)]
    turned = [painting.verdict(f, ("carrot", "tiger"), 64) for f in found]
    assert np.mean(verdicts) >= 0.9
    assert not any(placed for _, placed in turned)
    assert not any(present for present, _ in [painting.verdict(f, ("tiger", "robot"), 64)
                                              for f in found])  # fmt: skip


def test_only_painting_takes_any_pipeline_that_is_no_cascade(tmp_path):
    command = [sys.executable, "-m", "eval.ediffi", f"--cascade={DEFAULT_MODEL}"]
    refused = subprocess.run(
        [*command, "--study=style", f"--out={tmp_path}"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    # the last lines: with an old jaxlib, grain warns before them
    assert refused.stderr.splitlines()[-2:] == [
        "error: style needs a cascade [--cascade]",
        "  fix: train configs/ediffi.py, or give --style, too",
    ]


def test_painted_questions_name_no_side_and_are_balanced():
    asked = painting.questions(64, 0, 8)
    firsts = [a["prompt"].split(" and ")[0].split(" ", 1)[1] == a["things"][0] for a in asked]
    assert 0.3 < np.mean(firsts) < 0.7
    for one in asked[:8]:
        left, right = (one["masks"][word] for word in one["things"])
        assert left[:, :4].all()
        assert right[:, 4:].all()
        assert np.all(left + right == 1)


def test_style_is_judged_on_the_prompted_thing_alone():
    asked = style.questions(8, 0)
    same = [scene(n, concepts=[a["thing"]], style=a["style"]) for n, a in enumerate(asked)]
    right = style.judge(np.stack([s["image"] for s in same]), asked)
    assert right["style"]["value"] >= 0.85
    assert right["objects"]["value"] == 1.0
    references = style.judge(np.stack([a["reference"] for a in asked]), asked)
    assert references["objects"]["value"] == 0.0  # the reference's thing is another one
    assert references["leaked"]["value"] == 1.0
    assert references["style"] is None  # nothing to judge
    assert references["leaked by chance"]["value"] <= 0.2


def test_what_the_embedding_of_a_reference_knows_bounds_the_style(monkeypatch):
    """The shipped CLIP tells four styles apart; one that reads nothing is right once in four."""
    shipped = cnxs_jax.load_pipeline(DEFAULT_MODEL.parent / "ediffi_tiny")
    found = style.told_by_clip(shipped, 0, fitted=192, judged=64)
    assert found["value"] > 0.6
    white = np.ones((64, 64, 3), np.float32)
    blind = [a | {"reference": white} for a in style.questions(256, 1)]
    monkeypatch.setattr(style, "questions", lambda number, seed: blind)
    assert style.told_by_clip(shipped, 0, fitted=192, judged=64)["value"] < 0.4


def test_a_pixart_that_reads_references_is_studied_without_stages(tmp_path):
    """Its references are told as well as the cascade's: it has the same CLIP."""
    root = tmp_path / "style"
    words = StyleWords(projection_dim=128, d_model=128, num_words=3, hidden_size=8)
    params = words.init(jax.random.key(0), jnp.zeros((1, 128)))["params"]
    save_model(words, params, root / "style_words")
    assets = DEFAULT_MODEL.parent
    shutil.copytree(assets / "scene_clip" / "clip_image_encoder", root / "clip_image_encoder")
    reading = cnxs_jax.load_pipeline(DEFAULT_MODEL, style=root)
    rows = style.rows_of(reading, style.questions(2, 0))
    assert list(rows) == [
        "no reference", "no reference, the prompt names the style", "as the text's",
        "1.0", "2.0", "4.0", "8.0",
    ]  # fmt: skip
    assert style.told_by_clip(reading, 0, fitted=192, judged=64)["value"] >= 0.6


def test_real_scenes_bound_what_the_larger_stages_keep_of_a_style():
    """At 16 px real scenes have their style, and the shipped larger stages do not undo it."""
    shipped = cnxs_jax.load_pipeline(DEFAULT_MODEL.parent / "ediffi_tiny")
    found = style.enlarged(shipped, style.questions(8, 0), seed=0)
    assert found["style"]["value"] >= 0.85
    assert found["objects"]["value"] == 1.0


def test_style_rows_ask_for_the_same_things():
    stages = [SimpleNamespace()] * 3
    asking = SimpleNamespace(stages=stages, defaults=lambda: (25, 3.0))
    asked = style.questions(8, 0)
    rows = style.rows_of(asking, asked)
    for label, (prompts, options) in rows.items():
        named = [a["thing"] in p and a["style"] in p for a, p in zip(asked, prompts, strict=True)]
        assert all(named) == ("names the style" in label)
        assert ("style_image" in options) != label.startswith("no reference")
        assert options.get("guidance_scale") == ([3.0] * 3 if "every stage" in label else None)


def test_masked_conditions_leave_the_prompt_without_effect(pipe):  # noqa: F811
    bare = encoders.without(pipe, *MASKS)
    same = drawn(bare, "a red fox", guidance_scale=1.0), drawn(bare, "blue", guidance_scale=1.0)
    np.testing.assert_array_equal(*same)
    told = drawn(pipe, "a red fox", guidance_scale=1.0)
    assert np.abs(told - same[0]).max() > 1e-3
    without_clip = drawn(encoders.without(pipe, "clip_text_mask"), guidance_scale=1.0)
    assert np.abs(told - without_clip).max() > 1e-4
    with pytest.raises(ValueError, match="unknown masks"):
        encoders.without(pipe, "text")


def test_a_picture_of_a_study_does_not_depend_on_its_batch(pipe, monkeypatch):  # noqa: F811
    prompts = ["a red fox", "blue", "a red fox"]
    monkeypatch.setattr(ask, "BATCH", 2)
    images = ask.draw(pipe, prompts, seed=3)
    assert images.shape == (3, 16, 16, 3)
    assert np.abs(images[0].astype(int) - images[2]).max() > 0  # another noise
    monkeypatch.setattr(ask, "BATCH", 3)
    again = ask.draw(pipe, prompts, seed=3).astype(int)
    assert np.abs(images.astype(int) - again).max() <= 1


@pytest.mark.parametrize(("cut", "which"), [(0, 1), (3, 0)])
def test_a_switch_at_either_end_is_one_prompt(pipe, cut, which):  # noqa: F811
    prompts = [["a red fox"] * 2, ["blue"] * 2]
    made = attention.switched(pipe, *prompts, cut=cut, seed=1)
    same = attention.switched(pipe, prompts[which], prompts[which], cut=1, seed=1)
    np.testing.assert_array_equal(made, same)
    half = attention.switched(pipe, *prompts, cut=1, seed=1)
    other = attention.switched(pipe, *prompts, cut=3 - cut, seed=1)
    assert np.abs(half.astype(int) - made).max() > 0
    assert np.abs(other.astype(int) - made).max() > 0


def test_attention_goes_to_text_or_to_the_null_token(pipe):  # noqa: F811
    module, params = pipe.stages[0].experts[1]
    batch = attention.real_batch(pipe, 4, seed=0)
    sigma = jnp.full((4,), 2.0)
    share, effect = attention.at_level(
        module, params, batch, sigma, jax.random.normal(jax.random.key(0), batch["x"].shape), 0.5
    )
    assert np.all((np.asarray(share) > 0.05) & (np.asarray(share) < 0.999))
    assert np.all(np.asarray(effect) > 1e-4)
    bare = {"x": batch["x"], "cond": {**batch["cond"], **dropped(batch["cond"])}}
    share, effect = attention.at_level(module, params, bare, sigma, 0 * batch["x"], 0.5)
    np.testing.assert_array_equal(share, 0.0)
    np.testing.assert_array_equal(effect, 0.0)


def test_every_level_is_read_by_its_owner(pipe):  # noqa: F811
    rows = attention.attention(pipe.stages[0], attention.real_batch(pipe, 2, 0), (0.1, 50.0))
    assert [row["expert"] for row in rows] == [i.name for i in pipe.stages[0].intervals]


def finished(root, values, names):
    """A run's report with these losses in three noise intervals."""
    root.mkdir(parents=True)
    bins = [
        {"quantiles": q, "expert": name, "result": v}
        for q, v, name in zip(([0, 0.25], [0.25, 0.5], [0.5, 1]), values, names, strict=True)
    ]
    (root / "report.json").write_text(json.dumps({"losses": {"base": {"bins": bins}}}))


def test_arms_are_compared_seed_by_seed(tmp_path):
    """Levels count by their mass: an expert's are a quarter and a half here."""
    for seed, factor in ((0, 1.0), (1, 3.0)):
        shared = np.array([1.0, 2.0, 2.0]) * factor
        finished(tmp_path / f"shared_{seed}", shared, ["all"] * 3)
        own = shared * [0.8, 0.6, 0.9 + 0.1 * seed]
        finished(tmp_path / f"two_{seed}", own, ["low", "high", "high"])
    rows, intervals = experts.compare(tmp_path, ["shared", "two"], [0, 1])
    assert [row["quantiles"] for row in rows] == ["0 to 0.25", "0.25 to 0.5", "0.5 to 1", "all"]
    assert [row["two"] for row in rows[:3]] == pytest.approx([0.8, 0.6, 0.95])
    assert rows[2]["two, each seed"] == "0.900, 1.000"
    # (0.8 + 1.2 + 2 * 1.8) / 7, (0.8 + 1.2 + 2 * 2.0) / 7
    assert rows[3]["two, each seed"] == "0.800, 0.857"
    assert "shared" not in rows[0]
    assert rows[2]["shared, loss of each seed"] == "2.00000, 6.00000"
    assert [row["two, expert"] for row in rows] == ["low", "high", "high", "low, high"]
    # (1.2 + 2 * 1.8) / 6, (1.2 + 2 * 2.0) / 6
    assert [(row["quantiles"], row["two, each seed"]) for row in intervals] == [
        ("0.25 to 1", "0.800, 0.867")
    ]
    with pytest.raises(ConfigError, match="no finished run"):
        experts.compare(tmp_path, ["mixed", "shared"], [0])


def test_arms_of_a_seed_share_their_parent(tmp_path):
    (tmp_path / "shared_0" / "shared" / "export").mkdir(parents=True)
    experts.share_parent(tmp_path, "two", 0)
    assert (tmp_path / "two_0" / "shared" / "export").is_dir()
    experts.share_parent(tmp_path, "two", 1)
    experts.share_parent(tmp_path, "deeper", 0)
    assert {path.name for path in tmp_path.iterdir()} == {"shared_0", "two_0"}
    first, second = (experts.config_of("three", seed).to_dict() for seed in (0, 1))
    assert first["shared"] == experts.config_of("updates", 0).to_dict()["shared"]
    seeds = [[run[name]["seed"] for name in run["stages"]] for run in (first, second)]
    assert len(set(seeds[0] + seeds[1])) == 8  # no stage draws what another one drew
    longer = experts.config_of("shared", 0).longer
    assert longer.seed != first["shared"]["seed"]
    assert first["low"]["data"] == second["low"]["data"]  # the held-out pictures are the same


def test_arms_with_other_encoders_than_the_cascade_are_refused(pipe):  # noqa: F811
    experts.check_encoders(pipe, pipe)
    moved = jax.tree.map(lambda leaf: leaf + 1e-3, pipe.encoder_params)
    with pytest.raises(ConfigError, match="different encoders"):
        experts.check_encoders(pipe, dataclasses.replace(pipe, encoder_params=moved))


def test_arms_draw_with_their_own_base_at_each_scale_of_guidance(tmp_path, monkeypatch):
    """Real scenes stand for what is drawn at 5, the scenes of other prompts for what is at 1."""
    cascade = cnxs_jax.load_pipeline(DEFAULT_MODEL.parent / "ediffi_tiny")
    for arm in ("shared_0", "two_0"):
        cnxs_jax.save_pipeline(cascade, tmp_path / arm / "export")
    made = {
        scale: plan.prompts(emoji_scenes.world(), "test", 16, seed=seed)
        for scale, seed in ((1.0, 7), (5.0, 0))
    }
    bases = []

    def known(own, captions, guidance_scale):
        assert captions == made[5.0].captions
        assert [id(one) for one in own.stages[1:]] == [id(one) for one in cascade.stages[1:]]
        bases.append(own.stages[0])
        return made[guidance_scale].images

    monkeypatch.setattr(ask, "draw", known)
    rows = experts.pictures(tmp_path, ["shared", "two"], [0], cascade, 16, (1.0, 5.0))
    assert [(row["arm"], row["guidance"]) for row in rows] == [
        ("shared", 1.0), ("shared", 5.0), ("two", 1.0), ("two", 5.0),
    ]  # fmt: skip
    assert len({id(base) for base in bases} - {id(cascade.stages[0])}) == 2  # one an arm
    for blind, right in (rows[:2], rows[2:]):
        assert right["objects"]["value"] >= 0.9
        assert blind["objects"]["value"] <= 0.4


def test_swapped_masks_are_asked_for_the_swapped_places(monkeypatch):
    """What is drawn follows the masks here, so that both rows are placed right."""

    def follow(cascade, prompts, seed, word_masks, guidance_scale):
        pictures = []
        for n, masks in enumerate(word_masks):
            left = next(w for w, (mask, _) in masks.items() if mask[0, 0])
            things = [left, next(w for w in masks if w != left)]
            pictures.append(scene(n, concepts=things, relation="left of")["image"])
        return np.stack(pictures)

    monkeypatch.setattr(ask, "draw", follow)
    asked = painting.questions(8, 0, 64)
    for weight in (0.2, painting.SWAPPED):
        line, _ = painting.painted(None, asked, weight, 0, 64)
        assert line["placed"]["value"] >= 0.75, weight


def test_each_scale_of_guidance_has_its_rows(monkeypatch):
    asked_for = []

    def plain(cascade, prompts, seed, word_masks, guidance_scale):
        asked_for.append(guidance_scale)
        return np.zeros((len(prompts), 64, 64, 3), np.uint8)

    monkeypatch.setattr(ask, "draw", plain)
    sizes = SimpleNamespace(sizes=lambda *_: ((64, 64), None))
    figures, shown = painting.study(sizes, 8, 0, (2.0, 5.0), (0.2,))
    assert asked_for == [2.0, 2.0, 5.0, 5.0]
    assert [row["guidance"] for row in figures["rows"]] == asked_for
    assert len(shown["images"]) == 4

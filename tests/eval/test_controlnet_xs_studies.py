"""The studies of ControlNet-XS: cut connections of a random controller, real scenes as samples."""

import json
import subprocess
import sys

import numpy as np
import pytest

from cnxs_jax import tree as trees
from cnxs_jax.control import hints
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines.control import Controller
from eval import study
from eval.controlnet_xs import arms, bias, connections
from eval.draw import identity
from tests.pipelines import tiny_sd

NUMBER = 6


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_sd.pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def controller(plain):
    return Controller(*tiny_sd.xs_on(plain.components["unet"].module))


def latents(pipe, **more):
    options = {"num_inference_steps": 2, "output_type": "latent", **more}
    return pipe("a boat", **options).images


def test_groups_hold_every_connection_to_the_base_once(controller):
    found = connections.groups(controller.params)
    paths = [path for group in found.values() for path in group]
    assert len(paths) == len(set(paths))
    # stage outputs of the encoder, the middle, one before each stage of the decoder
    wide = {p for p in trees.flatten(controller.params) if "to_base" in p}
    assert wide == set(paths)
    assert {"conv_in", "mid_block", "down_blocks_0", "up_connections_0"} <= set(found)
    with pytest.raises(ConfigError, match="no connections"):
        connections.groups({"a": {"kernel": np.zeros(1)}})


def test_a_controller_without_connections_is_its_base(plain, controller):
    parts = connections.groups(controller.params)
    every = {path for paths in parts.values() for path in paths}
    none = controller._replace(params=connections.cut(controller.params, every))
    same = latents(plain.replace(control=none), image=tiny_sd.ramp())
    np.testing.assert_array_equal(same, latents(plain))
    for name, paths in parts.items():
        one = controller._replace(params=connections.cut(controller.params, set(paths)))
        with_all = latents(plain.replace(control=controller), image=tiny_sd.ramp())
        moved = latents(plain.replace(control=one), image=tiny_sd.ramp())
        assert np.abs(moved - with_all).max() > 1e-5, name


def test_real_scenes_of_the_hint_follow_the_hint_and_not_the_prompt():
    asked = bias.questions(NUMBER, 0)
    found = bias.judge(np.stack([a["picture"] for a in asked]), asked)
    assert found["hint"]["value"] == 1.0
    assert found["prompt"]["value"] == 0.0
    assert found["edge F1"]["value"] == 1.0
    moved = bias.judge(np.stack([a["picture"] for a in asked[1:] + asked[:1]]), asked)
    assert moved["edge F1"]["value"] < 0.6
    assert all(a["hint"].max() == 255 for a in asked)
    assert all(a["hint"].shape == (64, 64, 3) for a in asked)


def test_arms_differ_in_the_controller_alone():
    """Same base, data, noises and steps; the seed moves what is drawn."""
    plain, other = (arms.config_of(arm, 3, "base").to_dict() for arm in ("B", "ControlNet"))
    assert plain.pop("control") != other.pop("control")
    assert plain == other
    assert plain["seed"] == plain["data"]["seed"] == 3
    assert arms.directory("runs", "B half", 1).name == "B_half_1"


def test_a_row_has_the_mean_and_every_seed():
    rows = [{"control_edge_f1@1px": {"value": v}, "kid_efflite0": {"value": 2 * v}}
            for v in (0.5, 0.7)]  # fmt: skip
    found = arms.over_seeds(rows)
    assert found["edge F1"] == pytest.approx(0.6)
    assert found["KID, each seed"] == "1.000, 1.400"


def test_a_study_is_made_again_only_for_other_settings(tmp_path, capsys):
    made = []

    def function():
        made.append(1)
        images = {"row": np.zeros((2, 4, 4, 3), np.uint8)}
        return {"rows": [{"x": 1.0}], "notes": ["why"]}, {"prompts": ["a", "b"], "images": images}

    for settings, again in (({"n": 1}, False), ({"n": 1}, False), ({"n": 2}, False)):
        study.make(tmp_path, "one", settings, function, again)
    assert len(made) == 2
    study.make(tmp_path, "one", {"n": 2}, function, again=True)
    assert len(made) == 3
    assert json.loads((tmp_path / "one.json").read_text())["settings"] == {"n": 2}
    text = study.write(tmp_path, "Title", {"one": "First", "absent": "Second"}).read_text()
    assert "![First](one.png)" in text
    assert "| 1 |" in text
    assert "why" in text
    assert "Second" not in text
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_a_run_is_not_gone_on_with_on_another_base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    arms.check_base(tmp_path / "base", tmp_path / "run")
    arms.check_base(tmp_path / "base", tmp_path / "run")
    (tmp_path / "base" / "model_index.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="another base"):
        arms.check_base(tmp_path / "base", tmp_path / "run")


@pytest.mark.parametrize("words", [[], ["a"], ["0", "0"], ["-1"], ["²"], ["1", "01"], ["9" * 20]])
def test_seeds_are_different_whole_numbers(words):
    with pytest.raises(ConfigError, match="different whole numbers"):
        study.check_seeds(words)
    assert study.check_seeds(["0", "12"]) == [0, 12]


def test_neighbouring_encoders_are_part_of_a_pipelines_identity(tmp_path):
    for name in ("pipe", "words"):
        (tmp_path / name).mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text('{"encoders_beside": {"text": "words"}}')
    before = identity(tmp_path / "pipe")
    (tmp_path / "words" / "config.json").write_text("{}")
    assert identity(tmp_path / "pipe") != before


def test_a_word_that_a_study_does_not_know_is_named():
    study.check_names(["A", "ControlNet"], arms.ARMS, "--arms")
    with pytest.raises(ConfigError, match=r'unknown .Contrlnet.*Did you mean "ControlNet".*--arms'):
        study.check_names(["A", "Contrlnet"], arms.ARMS, "--arms")
    for words in ([], ["A", "A"]):
        with pytest.raises(ConfigError, match="different names.*--arms"):
            study.check_names(words, arms.ARMS, "--arms")


CALLS = """
import sys
from absl import flags
from cnxs_jax.errors import ConfigError
from eval.controlnet_xs import __main__ as command, arms

arms.study = lambda runs, own, *_, **__: (print("compared", *own), ({}, None))[1]
for given in sys.argv[2:]:
    flags.FLAGS(["command", sys.argv[1], *given.split()])
    try:
        command.main(["command"])
    except ConfigError as error:
        print("refused:", error)
    flags.FLAGS.unparse_flags()
"""


def test_the_command_compares_the_arms_that_it_is_given(tmp_path):
    both = "--study=types --arms=B,ControlNet"  # the second time they are there already
    calls = [both, both, "--study=types --arms=B", "--study=connections --arms=B"]
    out = subprocess.run(
        [sys.executable, "-c", CALLS, f"--out={tmp_path}", *calls],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    told = [line for line in out.splitlines() if line.startswith(("compared", "refused"))]
    assert told == [
        "compared B ControlNet",
        "compared B",
        "refused: types and bias have arms [--arms]",
    ]


def test_the_hint_of_a_question_is_the_recipes():
    (one,) = bias.questions(1, 0)
    np.testing.assert_array_equal(one["hint"], 255 * hints.canny(one["picture"][None])[0])

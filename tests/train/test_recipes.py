"""The recipes from start to end at their smallest: VAE, teacher, student, and what they export."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import cnxs_jax
import configs.pixart
import configs.pixart_lcm
from cnxs_jax import tree as trees
from cnxs_jax.errors import CheckpointError, ConfigError
from train import log, loop

ROOT = pathlib.Path(__file__).parents[2]


def train(recipe, workdir, *flags):
    """The command line on one device, as people run it."""
    command = [sys.executable, "-m", "train", f"--config=configs/{recipe}", f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


def distil(teacher, workdir, *flags):
    path = teacher / "teacher" / "export"
    return train(
        "pixart_lcm.py:smoke", workdir, f"--config.teacher_path={path}", "--config.data.size=32",
        *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Workdir of `configs/pixart.py:smoke`."""
    return train("pixart.py:smoke", tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """Workdir of `configs/pixart_lcm.py:smoke` on that teacher."""
    return distil(teacher, tmp_path_factory.mktemp("lcm"))


def test_the_teacher_is_a_pipeline_with_its_vae_scaled(teacher):
    pipe = cnxs_jax.load_pipeline(teacher / "teacher" / "export")
    images = pipe(["a red book"] * 2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 32, 32, 3)
    vae = json.loads((teacher / "vae" / "export" / "vae" / "config.json").read_text())
    assert vae["scaling_factor"] != 0.18215
    assert pipe.components["vae"].module.scaling_factor == vae["scaling_factor"]


def test_the_last_stage_starts_from_the_teacher_and_leaves_its_heads_behind(teacher):
    before, after = (
        {part: trees.flatten(cnxs_jax.load_model(teacher / stage / "export", part)[1])
         for part in ("transformer", "text_encoder")}
        for stage in ("teacher", "layout")
    )  # fmt: skip
    for part, weights in before.items():
        assert weights.keys() == after[part].keys()
        moved = [float(np.abs(after[part][k] - v).max()) for k, v in weights.items()]
        assert 0 < max(moved) < 0.1, part
    losses = log.read_metrics(teacher / "layout" / "metrics.jsonl")[0]
    assert {"word_order", "layout"} <= losses.keys()


def test_another_size_than_the_pipeline_to_start_from_is_named(teacher):
    config = loop.expand(configs.pixart.get_config("smoke").layout, teacher)
    config.transformer.num_layers = 3
    with pytest.raises(ConfigError, match="init_path"):
        loop.build_task(config)


def test_the_decoder_is_trained_on_and_the_latents_stay(teacher):
    before, after = (teacher / stage / "export" / "vae" for stage in ("vae", "decoder"))
    (vae, old), (again, new) = cnxs_jax.load_model(before), cnxs_jax.load_model(after)
    assert again.scaling_factor == vae.scaling_factor
    old, new = trees.flatten(old), trees.flatten(new)
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    assert moved == {path for path in old if not path.startswith(("encoder/", "quant_conv/"))}


def test_text_encoder_and_transformer_both_learn(teacher):
    """Both exported trees differ from their initial values (EMA of six steps)."""
    config = loop.expand(configs.pixart.get_config("smoke").teacher, teacher)
    key = jax.random.split(jax.random.key(config.seed), 3)[0]
    first = trees.flatten(jax.jit(loop.build_task(config).params)(key))
    for part in ("transformer", "text_encoder"):
        _, params = cnxs_jax.load_model(teacher / "teacher" / "export", part)
        moved = [
            np.abs(np.asarray(value) - np.asarray(first[f"{part}/{path}"])).max()
            for path, value in trees.flatten(params).items()
        ]
        assert np.mean(np.array(moved) > 1e-6) > 0.5


def test_the_student_starts_as_its_teacher_and_leaves_it(teacher, student):
    losses = [line["loss"] for line in log.read_metrics(student / "metrics.jsonl")]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    _, before = cnxs_jax.load_model(teacher / "teacher" / "export", "transformer")
    _, after = cnxs_jax.load_model(student / "export", "transformer")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 0.01
    for part in ("vae", "text_encoder"):
        pair = [cnxs_jax.load_model(p, part)[1] for p in (teacher / "teacher" / "export",
                                                          student / "export")]  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, *pair)


def test_the_student_draws_in_four_steps_by_default(student):
    pipe = cnxs_jax.load_pipeline(student / "export")
    result = pipe("a red book", output_type="np")
    assert result.parameters[0]["scheduler"] == "LCMScheduler"
    assert result.parameters[0]["steps"] == 4
    with Image.open(student / "samples" / "00000004.png") as picture:
        assert picture.size == (8 * 32, 2 * 32)


def test_a_tokenizer_larger_than_the_table_is_refused(teacher, tmp_path):
    config = loop.expand(configs.pixart.get_config("smoke").teacher, teacher)
    config.text_encoder.vocab_size = 100
    with pytest.raises(ConfigError, match="vocab_size 100 is less"):
        loop.main(config, tmp_path)


@pytest.mark.slow
def test_freezing_by_pattern_keeps_those_weights(teacher, tmp_path):
    distil(teacher, tmp_path, "--config.freeze=('transformer_blocks/attn2/.*',)")
    _, before = cnxs_jax.load_model(teacher / "teacher" / "export", "transformer")
    _, after = cnxs_jax.load_model(tmp_path / "export", "transformer")
    before, after = trees.flatten(before), trees.flatten(after)
    for path, value in after.items():
        same = np.array_equal(value, before[path])
        if "/attn2/" in path:
            assert same, path
    assert not np.array_equal(after["proj_out/kernel"], before["proj_out/kernel"])


def test_the_learned_null_caption_is_what_guides(teacher, tmp_path):
    """As converted from PixArt's own .pth: a side file of the transformer, kept by the student."""
    path = tmp_path / "teacher"
    pipe = cnxs_jax.load_pipeline(teacher / "teacher" / "export")
    null = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)
    cnxs_jax.save_pipeline(dataclasses.replace(pipe, null_text=null), path)
    config = configs.pixart_lcm.get_config("smoke")
    config.teacher_path, config.null, config.data.size = str(path), "learned", 32
    task = loop.build_task(config)
    raw = {k: v for k, v in next(task.loader).items() if loop.is_numeric(v)}
    cond = task.encode(task.encoders, raw, jax.random.key(0))["cond"]
    np.testing.assert_array_equal(cond["null"]["text"], np.stack([null] * config.batch_size))
    assert "text_mask" not in cond["null"]  # the prompt's own mask counts
    task.export(task.params, task.frozen, task.encoders, tmp_path / "export")
    again = cnxs_jax.load_pipeline(tmp_path / "export").null_text
    np.testing.assert_array_equal(again, null)


def test_a_missing_null_caption_is_named(teacher):
    config = configs.pixart_lcm.get_config("smoke")
    config.teacher_path, config.null = str(teacher / "teacher" / "export"), "learned"
    config.data.size = 32
    with pytest.raises(CheckpointError, match="null caption is missing"):
        loop.build_task(config)


def test_a_teacher_of_another_kind_is_refused(teacher, tmp_path):
    """It would train without a word, towards nothing."""
    config = configs.pixart_lcm.get_config("smoke")
    config.teacher_path, config.data.size = str(teacher / "teacher" / "export"), 32
    config.objective.prediction = "epsilon"
    with pytest.raises(ConfigError, match="predicts v_prediction, the config says epsilon"):
        loop.build_task(config)
    config.objective.prediction = "v_prediction"
    config.schedule.beta_end = 0.012
    with pytest.raises(ConfigError, match="another noise schedule"):
        loop.build_task(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 4}, "sample_size 4, 32 px give latents of 8"),
        ({"in_channels": 4, "out_channels": 4}, "in_channels 4, the VAE has 8"),
        ({"caption_channels": 24}, "caption_channels 24, the text encoder gives 16"),
    ],
)
def test_networks_that_do_not_fit_are_named(teacher, change, message):
    config = loop.expand(configs.pixart.get_config("smoke").teacher, teacher)
    config.transformer.update(change)
    with pytest.raises(ConfigError, match=message):
        loop.build_task(config)

"""A controller and a LoRA student, trained for a few steps on a random pipeline and exported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import cnxs_jax
from cnxs_jax import lora
from cnxs_jax.convert import lora as lora_files
from cnxs_jax.convert import pixart
from cnxs_jax.data import features
from cnxs_jax.diffusion import sampling, schedule
from cnxs_jax.errors import ConfigError
from tests.pipelines import tiny
from train import inputs, log, loop, networks, objectives, tasks_control, validate

pytestmark = pytest.mark.filterwarnings("ignore:caption has")

COMMON = {
    "seed": 0,
    "steps": 3,
    "batch_size": 8,
    "grad_accum": 1,
    "ema_decay": 0.5,
    "log_every": 1,
    "save_every": 3,
    "sample_every": 100,
    "mesh": {"data": -1, "fsdp": 1},
    "optimizer": {"name": "adamw", "learning_rate": 1e-2},
    "schedule": {"name": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_steps": 1000},
    "data": {"source": "shapes", "size": tiny.SIDE, "max_length": 8},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a tiny random pipeline."""
    path = tmp_path_factory.mktemp("base")
    cnxs_jax.save_pipeline(tiny.pipeline(path / "tokens"), path / "pipeline")
    return path / "pipeline"


def control_config(base, **control):
    return ConfigDict(
        COMMON
        | {
            "task": "train.tasks_control:controller",
            "base_path": str(base),
            "control": {"num_layers": 1, **control},
            "caption_dropout": 0.5,
            "objective": {"prediction": "epsilon"},
            "data": COMMON["data"] | {"hint": "lines"},
        }
    )


def lora_config(base, **options):
    return ConfigDict(
        COMMON
        | {
            "task": "train.tasks:distill",
            "teacher_path": str(base),
            "null": "empty_prompt",
            "objective": {"prediction": "epsilon", "omega": 4.5, "num_ddim_steps": 50},
            "lora": {"rank": 2, "alpha": 4.0, "targets": lora.ATTENTION_TARGETS, **options},
        }
    )


def test_a_controller_is_trained_and_exported(base, tmp_path):
    config = control_config(base)
    config.report = {"num_prompts": 3, "num_real": 3, "steps": (1,), "metrics": ("control_edges",)}
    loop.main(config, tmp_path)
    told = json.loads((tmp_path / "report.json").read_text())
    assert [row["method"] for row in told["rows"][2:]] == ["base without control", "controller"]
    assert all(0 <= row["control_edge_f1@1px"]["value"] <= 1 for row in told["rows"])
    assert told["summary"]["training steps"] == 3
    adapter, whole = (
        sum(x.size for x in jax.tree.leaves(cnxs_jax.load_model(*path)[1]))
        for path in ((tmp_path / "export" / "controlnet",), (base, "transformer"))
    )
    assert told["summary"]["trained parameters"] == adapter
    assert told["summary"]["frozen parameters"] == whole
    lines = log.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)
    adapter, params = cnxs_jax.load_model(tmp_path / "export" / "controlnet")
    assert (adapter.num_layers, adapter.attention_head_dim) == (1, 12)
    _, whole = cnxs_jax.load_model(base, "transformer")
    for zero in (params["before_proj"], params["controlnet_blocks"]["after_proj"]):
        assert np.abs(zero["kernel"]).max() > 0
    copied = params["controlnet_blocks"]["transformer_block"]["ff"]["net_2"]["kernel"]
    assert np.abs(copied[0] - whole["transformer_blocks"]["ff"]["net_2"]["kernel"][0]).max() > 0


def test_a_fresh_controller_has_the_loss_of_its_base(base):
    """Before the first step nothing has changed, and only the adapter has gradients."""
    task = loop.build_task(control_config(base))
    raw = {k: v for k, v in next(task.loader).items() if loop.is_numeric(v)}
    batch = jax.jit(task.encode)(task.encoders, raw, jax.random.key(1))
    assert batch["cond"]["hint"].shape == batch["x"].shape
    assert not np.allclose(batch["cond"]["hint"], batch["x"])
    module, params = cnxs_jax.load_model(base, "transformer")
    plain = objectives.denoise(sampling.denoiser(module), schedule.linear())
    key = jax.random.key(2)
    (loss, _), gradient = jax.jit(jax.value_and_grad(task.objective, has_aux=True))(
        task.params, None, task.frozen, batch, key
    )
    expected, _ = jax.jit(plain)(params, None, {}, batch, key)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert jax.tree.structure(gradient) == jax.tree.structure(task.params)


def test_the_picture_of_a_controller_shows_its_edges_and_scenes(base):
    config = control_config(base, order="paper")
    task = loop.build_task(config)
    picture = task.sample(task.params, task.frozen, task.encoders)
    assert picture.shape == (6 * tiny.SIDE, 8 * tiny.SIDE, 3)
    rows = picture.reshape(6, tiny.SIDE, 8, tiny.SIDE, 3)
    assert set(np.unique(rows[::3])) == {0, 255}  # hints, what was drawn, scenes
    scenes = np.concatenate(rows[2::3].swapaxes(1, 2))
    np.testing.assert_array_equal(scenes, inputs.shown(config, ("image", "hint"))["image"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Grey pictures with a bright box each, whose outline is known."""
    path = tmp_path_factory.mktemp("photos")
    for n in range(8):
        image = Image.new("RGB", (tiny.SIDE, tiny.SIDE), (90, 90, 90))
        image.paste((250, 250, 250), (2, 2, 6 + n, 13))
        image.save(path / f"{n}.png")
        (path / f"{n}.txt").write_text("a red fox")
    return path


def test_a_controller_of_ones_own_pictures_is_shown_their_edges(base, photos):
    config = control_config(base)
    config.data.update(source="image_folder", root=str(photos), hint="canny")
    validate.check(config)
    raw = next(loop.build_task(config).loader)
    assert raw["hint"].shape == (8, tiny.SIDE, tiny.SIDE, 3)
    for image, hint in zip(raw["image"], raw["hint"], strict=True):
        box, lines = image[..., 0] > 170, hint[..., 0] == 255
        inner = np.pad(box, 1)
        inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:] & box
        outline = box & ~inner
        assert (lines & ~outline).sum() <= lines.sum() / 2  # on the box's border or just beside it
        assert not lines[inner].any()
        assert lines.sum() >= outline.sum() / 2


def test_what_a_controller_cannot_be_shown(base, photos):
    config = control_config(base)
    config.data.update(source="image_folder", root=str(photos))
    with pytest.raises(ConfigError, match="image_folder has no exact lines") as caught:
        validate.check(config)
    assert 'set it to "canny"' in caught.value.fix


def test_hints_of_aspect_ratio_buckets(base, tmp_path):
    """Wide and tall pictures, a box in the middle of each: its outline, in the bucket's shape."""
    for n, size in enumerate([(60, 30)] * 8 + [(30, 60)] * 8):
        image = Image.new("RGB", size, (90, 90, 90))
        image.paste(
            (250, 250, 250), (size[0] // 3, size[1] // 3, size[0] // 3 + 10, size[1] // 3 + 10)
        )
        image.save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("a red fox")
    config = control_config(base)
    config.data.update(
        source="image_folder", root=str(tmp_path), hint="canny", size=256, buckets=True
    )
    validate.check(config)
    loader, _ = inputs.open_loader(config, tokens=False, keys=tasks_control.ARRAYS)
    found = [next(loader) for _ in range(2)]
    assert {raw["hint"].shape for raw in found} == {(8, 176, 352, 3), (8, 352, 176, 3)}
    for raw in found:
        assert raw["image"].shape == raw["hint"].shape
        bright = raw["image"][..., 0] > 170
        for box, lines in zip(bright, raw["hint"][..., 0] == 255, strict=True):
            for axis in (0, 1):
                inside, drawn = (np.flatnonzero(x.any(axis)) for x in (box, lines))
                assert np.abs(inside[[0, -1]] - drawn[[0, -1]]).max() <= 2


def test_features_of_other_hints_are_stale(base):
    made = {}
    for name in ("lines", "canny"):
        config = control_config(base)
        config.data.hint = name
        made[name] = networks.cache_settings(config, str(base), tasks_control.hint_picture)
    differ = features.differences(made["lines"], made["canny"])
    assert differ == "hint: cached 'lines', now 'canny'"


def test_a_lora_student_is_its_teacher_and_the_exported_adapter(base, tmp_path):
    loop.main(lora_config(base), tmp_path)
    export = tmp_path / "export"
    _, teacher = cnxs_jax.load_model(base, "transformer")
    _, student = cnxs_jax.load_model(export, "transformer")
    for name in ("pytorch_lora_weights.safetensors", "peft"):
        adapter = lora_files.load(export / "lora" / name, teacher, pixart.DIFFUSERS)
        scale = adapter["transformer_blocks"]["attn1"]["to_q"]["scale"].tolist()
        assert scale == ([2.0, 2.0] if name == "peft" else [1.0, 1.0])
        merged = lora.merge(teacher, jax.tree.map(jnp.asarray, adapter))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, student)
    blocks, before = student["transformer_blocks"], teacher["transformer_blocks"]
    assert (
        np.abs(blocks["attn2"]["to_v"]["kernel"] - before["attn2"]["to_v"]["kernel"]).max() > 1e-4
    )
    np.testing.assert_array_equal(blocks["ff"]["net_2"]["kernel"], before["ff"]["net_2"]["kernel"])


def test_a_fresh_lora_student_is_its_teacher(base):
    """The parameters of the first step are the teacher's to the bit."""
    task = loop.build_task(lora_config(base))
    params = jax.jit(task.params)(jax.random.key(0))
    resolved = objectives.with_lora(params, task.frozen)
    jax.tree.map(np.testing.assert_array_equal, resolved, task.frozen["teacher"])


def test_what_cannot_go_together(base):
    both = lora_config(base)
    both.freeze = ("transformer_blocks/.*",)
    with pytest.raises(ConfigError, match="give lora or freeze"):
        validate.check(both)
    with pytest.raises(ConfigError, match="matches no parameter"):
        loop.build_task(lora_config(base, targets=("blocks/to_q/kernel",))).params(
            jax.random.key(0)
        )
    with pytest.raises(ConfigError, match='Did you mean "paper"'):
        validate.check(control_config(base, order="papers"))
    validate.check(control_config(base, order="unet"))

"""A controller and a LoRA student, trained for a few steps on a random pipeline and exported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import cnxs_jax
from cnxs_jax import lora
from cnxs_jax.control import hed
from cnxs_jax.convert import lora as lora_files
from cnxs_jax.convert import pixart
from cnxs_jax.diffusion import sampling, schedule
from cnxs_jax.errors import ConfigError
from tests.control import detector
from tests.pipelines import tiny
from train import abstract, features, log, loop, objectives, validate

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
    loop.main(config, tmp_path)
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


def test_the_picture_of_a_controller_shows_its_edges(base):
    task = loop.build_task(control_config(base, order="paper"))
    picture = task.sample(task.params, task.frozen, task.encoders)
    assert picture.shape == (4 * tiny.SIDE, 8 * tiny.SIDE, 3)
    hints = picture.reshape(4, tiny.SIDE, -1)[::2]
    assert set(np.unique(hints)) == {0, 255}


def test_the_hint_of_a_detector_is_encoded(base, tmp_path):
    """HED edges of the batch's pictures, in [-1, 1], through the pipeline's VAE."""
    config = control_config(base)
    config.detector, config.detector_path = "hed", str(detector.write(tmp_path))
    validate.check(config)
    task = loop.build_task(config)
    raw = {k: v for k, v in next(task.loader).items() if loop.is_numeric(v)}
    assert "edges" not in raw
    key = jax.random.key(1)
    hint = jax.jit(task.encode)(task.encoders, raw, key)["cond"]["hint"]
    vae, params = cnxs_jax.load_model(base, "vae")
    shown = np.stack([hed.edges(raw["image"], config.detector_path)] * 3, axis=-1)
    run = jax.jit(lambda params, x: vae.apply({"params": params}, x, method="encode"))
    mean, logvar = run(params, 2.0 * shown - 1.0)
    moments = {"hint_mean": mean, "hint_logvar": logvar}
    nets = abstract.networks.Networks(None, None, vae, None, None, None)
    expected = features.latents(nets, moments, jax.random.split(key, 3)[2], "hint_")
    np.testing.assert_allclose(hint, expected, atol=1e-5)


def test_a_detector_is_planned_without_its_weights(base, monkeypatch):
    monkeypatch.setattr(hed, "packaged", lambda: None)
    config = control_config(base)
    config.detector = "hed"
    _, _, shapes = abstract.built(config)
    assert shapes["batch"]["cond"]["hint"].shape == shapes["batch"]["x"].shape
    assert shapes["encoders"]["detector"]["fuse"]["kernel"].shape == (1, 1, 5, 1)


def test_photographs_need_a_detector(base):
    config = control_config(base)
    config.data.update(source="image_folder", root="photos")
    with pytest.raises(ConfigError, match='(?s)no exact edges.*set it to "hed"'):
        validate.check(config)
    config.detector = "hed"
    validate.check(config)
    config.detector, config.detector_path = None, "x.pth"
    config.data.source = "shapes"
    with pytest.raises(ConfigError, match="weights of no detector"):
        validate.check(config)


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

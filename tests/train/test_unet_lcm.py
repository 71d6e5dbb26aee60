"""Distilling Stable Diffusion: three kinds of student, their exports, figures and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import cnxs_jax
import configs.sd_lcm
from cnxs_jax import lora, sharding
from cnxs_jax import tree as trees
from cnxs_jax.convert import lora as lora_files
from cnxs_jax.convert import unet as layouts
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import request as requests
from tests.pipelines import tiny_sd
from tests.train.test_unet_tasks import raw_batch, saved, train
from train import abstract, loop, networks_unet, objectives, tasks_unet_lcm, validate

pytestmark = pytest.mark.filterwarnings("ignore:caption has")
PROJECTION = tasks_unet_lcm.PROJECTION


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The directory of a tiny random pipeline."""
    return saved(tmp_path_factory.mktemp("sd"))


def config_of(path, **own):
    """The recipe at the size of `tiny_sd`: by default with an embedding of omega."""
    config = configs.sd_lcm.get_config("smoke")
    config.teacher_path, config.matmul_precision = str(path), None
    config.data.update({"source": "shapes", "size": tiny_sd.SIDE, "max_length": 77})
    config.schedule = ConfigDict(
        {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_steps": 1000}
    )
    config.objective.prediction = "epsilon"
    config.optimizer.update(learning_rate=1e-2, warmup_steps=0, schedule="constant")
    config.guidance_embedding = 8
    config.update(own)
    return config


def fixed(config):
    """With one omega for all instead."""
    config.objective.omega, config.objective.omega_range = 3.0, None
    config.guidance_embedding = None
    return config


def with_adapter(config):
    config = fixed(config)
    config.lora = ConfigDict({"rank": 2, "alpha": 4.0, "targets": configs.sd_lcm.TARGETS})
    return config


def steps(config, workdir, number=2):
    """A Fit after so many steps on one device; what it started with; its batches; the metrics."""
    validate.check(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        fit = loop.Fit(config, loop.build_task(config), mesh, workdir)
        fit.state = fit.fresh()
        first = jax.device_get((fit.state.params, fit.frozen))
        batches, found = [fit.batch(step) for step in range(number)], []
        for batch in batches:
            fit.state, metrics = fit.step(fit.state, fit.frozen, batch, fit.key_step)
            found.append(jax.device_get(metrics))
    return fit, first, jax.device_get(batches), found


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """Two steps with an embedding of omega."""
    return steps(config_of(teacher), tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_the_student_starts_as_its_teacher(teacher, run):
    """It has the embedding's projection beyond it, which is zero: omega changes nothing yet."""
    fit, (start, frozen), batches, _ = run
    student, own = trees.flatten(start), trees.flatten(frozen["teacher"])
    assert student.keys() - own.keys() == {PROJECTION}
    assert student[PROJECTION].shape == (8, 8)
    assert not student[PROJECTION].any()
    for name, value in own.items():
        np.testing.assert_array_equal(student[name], value)
    module, params = cnxs_jax.load_model(teacher, "unet")
    embedded = module.clone(time_cond_proj_dim=8)
    x, cond = batches[0]["x"], {**batches[0]["cond"], "guidance": jnp.linspace(1.0, 5.0, 8)}
    t = jnp.full((8,), 500)
    expected = jax.jit(module.apply)({"params": params}, x, t, cond)
    out = jax.jit(embedded.apply)({"params": start}, x, t, cond)
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.slow
def test_the_embedding_is_learned_and_the_teacher_stays(run):
    fit, (start, frozen), _, metrics = run
    assert all(m["finite"] and m["grad_norm"] > 0 for m in metrics)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(fit.frozen), frozen)
    after, before = (trees.flatten(jax.device_get(t)) for t in (fit.state.params, start))
    assert np.abs(after[PROJECTION]).max() > 1e-3
    assert all(np.any(after[name] != value) for name, value in before.items() if value.ndim > 1)


def test_omega_is_drawn_for_each_picture_and_given_to_both(monkeypatch):
    """The teacher is guided by what the student reads; the keys of time and noise are others."""
    seen = {}

    def student(params, x, t, cond):
        seen.setdefault("student", cond["guidance"])
        return params["w"] * x

    def teacher(params, x, t, cond):
        return x * cond["text"][:, :, None, None]

    def step(denoise, schedule, params, x, t, s, cond, omega, prediction):
        seen["teacher"] = omega
        return x

    monkeypatch.setattr(objectives.lcd, "teacher_step", step)
    schedule = objectives.schedules.linear()
    objective = objectives.consistency(student, teacher, schedule, omega_range=(2.0, 14.0))
    params, batch = {"w": jnp.ones(())}, {"x": jnp.ones((64, 2, 2, 1)), "cond": {"null": {}}}
    keys = jax.random.split(jax.random.key(0), 64)
    objective(params, params, {"teacher": params}, batch, keys)
    omega = np.asarray(seen["student"])
    np.testing.assert_array_equal(omega, seen["teacher"])
    assert 2.0 <= omega.min() < 4.0 < 12.0 < omega.max() < 14.0
    assert np.unique(omega).size == 64
    again = objectives.draw_omega(keys[:3], 3, (2.0, 14.0))
    np.testing.assert_array_equal(again, omega[:3])


@pytest.mark.slow
def test_the_export_takes_guidance_as_an_input(run, tmp_path):
    fit, *_ = run
    fit.task.export(fit.state.ema, fit.frozen, fit.encoders, tmp_path / "export")
    pipe = cnxs_jax.load_pipeline(tmp_path / "export")
    assert pipe.scheduler["_class_name"] == "LCMScheduler"
    assert pipe.scheduler["original_inference_steps"] == 50
    assert pipe.components["unet"].module.time_cond_proj_dim == 8
    assert pipe.defaults() == (4, 8.5)
    stored = pipe.components["unet"].params
    jax.tree.map(np.testing.assert_array_equal, stored, jax.device_get(fit.state.ema))
    options = {"output_type": "latent", "num_inference_steps": 2}
    low, high = (pipe("a boat", guidance_scale=w, **options).images for w in (2.0, 6.0))
    assert np.abs(low - high).max() > 1e-4
    assert np.isfinite(high).all()


@pytest.mark.parametrize("kind", ["base", "xl"])
def test_the_teachers_conditions_are_the_pipelines(kind, teacher, tmp_path):
    """Text, pooled text, sizes, and what its unconditional half sees."""
    path = teacher if kind == "base" else saved(tmp_path, xl=True)
    config = config_of(path)
    nets, tokenizers, _, empty = tasks_unet_lcm.opened(config, path)
    pipe, captions = cnxs_jax.load_pipeline(path), ["a boat", "a red fox"]
    request = requests.check(captions, None, 2, 7.5, None, None, 1, 0, None, "np")
    expected = pipe.encode(request, (16, 16))
    tokenize = networks_unet.tokenizing(tokenizers)
    raw = tasks_unet_lcm.inputs.tokens(config, None, captions, tokenize)
    raw["image"] = np.zeros((2, 16, 16, 3), np.uint8)
    made = jax.jit(lambda: networks_unet.guided_condition(nets, nets.encoders, raw, empty))()
    assert made.keys() == expected.keys() - {"guidance_scale"}
    assert made["null"].keys() == expected["null"].keys()
    for given, wanted in ((made, expected), (made["null"], expected["null"])):
        for name in given.keys() - {"null"}:
            np.testing.assert_allclose(given[name], wanted[name], atol=1e-6, err_msg=name)


def test_a_fixed_omega_is_no_input(teacher):
    task = loop.build_task(fixed(config_of(teacher)))
    assert PROJECTION not in trees.flatten(task.params)
    encoded = jax.eval_shape(task.encode, task.encoders, raw_batch(task), jax.random.key(0))
    assert encoded["cond"].keys() == {"text", "null"}
    assert encoded["cond"]["null"]["text"].shape == encoded["cond"]["text"].shape


@pytest.mark.slow
def test_an_adapter_is_exported_for_diffusers(teacher, tmp_path):
    """The files hold what the export has merged; convolutions are adapted, too."""
    fit, *_ = steps(with_adapter(config_of(teacher)), tmp_path / "run")
    fit.task.export(fit.state.ema, fit.frozen, fit.encoders, tmp_path / "export")
    _, before = cnxs_jax.load_model(teacher, "unet")
    pipe = cnxs_jax.load_pipeline(tmp_path / "export")
    assert pipe.defaults() == (4, 0.0)
    merged = pipe.components["unet"].params
    for name in ("pytorch_lora_weights.safetensors", "peft"):
        file = tmp_path / "export" / "lora" / name
        adapter = lora_files.load(file, before, layouts.DIFFUSERS)
        found = lora.merge(before, jax.tree.map(jnp.asarray, adapter))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, merged)
    flat, own = trees.flatten(merged), trees.flatten(before)
    moved = {k for k in flat if np.abs(flat[k] - own[k]).max() > 1e-5}
    assert "down_blocks_0/resnets_0/conv1/kernel" in moved
    assert "down_blocks_0/downsamplers_0/conv/kernel" in moved
    assert not [k for k in moved if not k.endswith("/kernel")]


# --- configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.omega": 3.0}, "omega .one for all. or omega_range"),
        ({"objective.omega_range": None}, "omega .one for all. or omega_range"),
        ({"objective.omega_range": (5.0, 2.0)}, "no range of guidance"),
        ({"guidance_embedding": 9}, "9 is odd"),
        ({"objective.omega_range": None, "objective.omega": 2.0}, "learns nothing"),
        ({"objective.num_ddim_steps": 30}, "must divide the 1000"),
        ({"data.source": "features"}, "not cached features"),
        ({"data.buckets": True}, "pictures of one size"),
        ({"objective.learned_range": True}, "unknown key 'learned_range'"),
    ],
)
def test_bad_configs_are_named(changes, message):
    config = configs.sd_lcm.get_config("tiny_omega")
    validate.check(config)
    with config.unlocked(), config.ignore_type():
        for key, value in changes.items():
            parent, _, last = key.rpartition(".")
            place = config[parent] if parent else config
            place[last] = value
    with pytest.raises(ConfigError, match=message):
        validate.check(config)


def test_what_does_not_fit_the_teacher_is_named(teacher, tmp_path):
    config = with_adapter(config_of(teacher))
    config.objective.omega, config.objective.omega_range = None, (1.0, 2.0)
    config.guidance_embedding = 8
    with pytest.raises(ConfigError, match="give lora or guidance_embedding"):
        validate.check(config)
    with pytest.raises(ConfigError, match="no pipeline at 'nowhere'.*config.teacher_path"):
        loop.build_task(config_of("nowhere"))
    with pytest.raises(ConfigError, match="distilled already"):
        loop.build_task(config_of(saved(tmp_path, time_cond_proj_dim=8)))


# --- the published sizes ----------------------------------------------------------------------

SIZES = {"sd15": (859_520_964, 768), "sd21": (865_910_724, 1024), "sdxl": (2_567_463_684, 2048)}


@pytest.mark.parametrize("variant", configs.sd_lcm.FULL)
def test_the_figures_are_the_published_ones(variant):
    config = configs.sd_lcm.get_config(variant)
    validate.check(config)
    name, _, kind = variant.partition("_")
    paper = name == "sd21"
    assert config.optimizer.learning_rate == (8e-6 if paper else 1e-6)
    assert config.ema_decay == (0.999943 if paper else 0.95)
    assert (config.steps, config.batch_size) == ((100_000, 72) if paper else (1000, 12))
    assert config.data.size == (1024 if name == "sdxl" else 512)
    limits = {"sd15": (5.0, 15.0), "sd21": (2.0, 14.0), "sdxl": (3.0, 15.0)}[name]
    assert config.objective.omega_range == (None if kind == "fixed" else limits)
    assert config.guidance_embedding == (None if kind else 256)
    assert (config.lora is not None) == (kind == "lora")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sd15", "sd21_fixed", "sdxl", "sd15_lora"])
def test_state_and_step_build_on_shapes(variant):
    """The student has the published number of parameters; nothing is allocated."""
    config = configs.sd_lcm.get_config(variant)
    config.batch_size = 2
    number, width = SIZES[variant.split("_")[0]]
    _, (student, _), shapes = abstract.built(config)
    state, batch, side = shapes["state"], shapes["batch"], config.data.size // 8
    assert trees.size(shapes["frozen"]["teacher"]) == number
    if config.guidance_embedding:
        assert trees.size(state.params) == number + 256 * 320
    elif config.lora is None:
        assert trees.size(state.params) == number
    else:
        assert trees.size(state.params) < 0.08 * number
    assert student.time_cond_proj_dim == config.guidance_embedding
    assert {str(v.dtype) for v in jax.tree.leaves(state.params)} == {"float32"}
    assert batch["x"].shape == (2, side, side, 4)
    assert batch["cond"]["null"]["text"].shape == batch["cond"]["text"].shape == (2, 77, width)
    assert ("pooled" in batch["cond"]) == (variant == "sdxl")


# --- from start to end ------------------------------------------------------------------------


@pytest.mark.slow
def test_teacher_and_student_from_start_to_end(tmp_path):
    """`configs/sd.py:smoke`, then `configs/sd_lcm.py:smoke` on it; four steps draw a picture."""
    train("sd.py:smoke", tmp_path / "sd")
    path = tmp_path / "sd" / "export"
    losses = train("sd_lcm.py:smoke", tmp_path / "lcm", f"--config.teacher_path={path}")
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    pipe = cnxs_jax.load_pipeline(tmp_path / "lcm" / "export")
    found = pipe("a red book", output_type="np")
    assert found.images.shape == (1, 32, 32, 3)
    assert found.parameters[0]["steps"] == 4

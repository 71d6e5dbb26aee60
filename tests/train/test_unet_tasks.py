"""Stable Diffusion's recipes: a controller on a random base, its hints; both from start to end."""

import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import cnxs_jax
import configs.controlnet_xs
import configs.sd
from cnxs_jax import control, sharding
from cnxs_jax import tree as trees
from cnxs_jax.control import hints
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.diffusion import sampling
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import request as requests
from tests.control import detector, estimator
from tests.pipelines import tiny_sd
from train import (
    abstract,
    inputs,
    log,
    loop,
    measure,
    networks_unet,
    objectives,
    plan,
    tasks_unet,
    validate,
)
from train.parts import noise_schedule

pytestmark = pytest.mark.filterwarnings("ignore:caption has")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a tiny random pipeline."""
    return saved(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """The same of SDXL's kind."""
    return saved(tmp_path_factory.mktemp("xl"), xl=True)


def saved(path, **options):
    cnxs_jax.save_pipeline(tiny_sd.pipeline(path / "tokens", **options), path / "pipeline")
    return path / "pipeline"


def config_of(path, **own):
    """The recipe of a controller at the size of `tiny_sd`."""
    config = configs.controlnet_xs.get_config("smoke")
    config.base_path, config.matmul_precision = str(path), None
    config.data.update({"source": "shapes", "size": tiny_sd.SIDE, "max_length": 77})
    config.schedule = ConfigDict(
        {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_steps": 1000}
    )
    config.objective.prediction = "epsilon"
    config.caption_dropout = 0.5
    config.control.update({"conditioning_embedding_out_channels": (4, 6)} | own)
    return config


def raw_batch(task):
    return {k: v for k, v in next(task.loader).items() if loop.is_numeric(v)}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Two steps: the Fit, what it started with, and the metrics of the steps."""
    config = config_of(base)
    validate.check(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        fit = loop.Fit(config, loop.build_task(config), mesh, tmp_path_factory.mktemp("run"))
        fit.state = fit.fresh()
        first = jax.device_get((fit.state.params, fit.frozen))
        batches = [fit.batch(step) for step in range(2)]
        found = []
        for batch in batches:
            fit.state, metrics = fit.step(fit.state, fit.frozen, batch, fit.key_step)
            found.append(jax.device_get(metrics))
    return config, fit, first, jax.device_get(batches[0]), found


def test_the_controller_starts_with_the_loss_of_its_base(base, run):
    """All connections to the base are zero: before the first step it is the base."""
    config, fit, _, batch, metrics = run
    unet, params = cnxs_jax.load_model(base, "unet")
    plain = objectives.denoise(sampling.denoiser(unet), noise_schedule(config))
    key = jax.random.fold_in(fit.key_step, 0)
    expected, _ = jax.jit(plain)(params, None, {}, batch, jax.random.split(key, 8))
    np.testing.assert_allclose(metrics[0]["loss"], expected, rtol=1e-6)


def test_only_the_adapter_is_trained(run):
    """State, moments and average have its leaves and no other; the base stays to the bit."""
    _, fit, (before, frozen), _, metrics = run
    state, own = fit.state, trees.flatten(before)
    assert all(m["finite"] and m["grad_norm"] > 0 for m in metrics)
    for tree in (state.params, state.ema):
        assert trees.flatten(tree).keys() == own.keys()
    arrays = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(a.shape for a in arrays) == sorted(2 * [v.shape for v in own.values()])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(fit.frozen), frozen)
    after = trees.flatten(jax.device_get(state.params))
    zero = "mid_block/ctrl_to_base/kernel"
    assert not own[zero].any()
    assert after[zero].any()


def test_the_base_is_kept_once(run):
    """No function of the task holds the base's parameters beside `frozen`."""
    config, fit, *_ = run
    nets = fit.task.encode.__closure__
    held = [cell.cell_contents for cell in nets]
    found = [leaf for leaf in jax.tree.leaves(held) if hasattr(leaf, "shape")]
    assert all(leaf.size <= 77 for leaf in found)  # the tokens of the empty prompt


def test_the_exported_adapter_computes_the_same(base, run, tmp_path):
    config, fit, *_, batch, _ = run
    fit.task.export(fit.state.ema, fit.frozen, fit.encoders, tmp_path)
    again, params = cnxs_jax.load_model(tmp_path / "controlnet")
    assert (again.control_type, again.infusion) == ("B", "cat")
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(fit.state.ema))
    unet, weights = cnxs_jax.load_model(base, "unet")
    module, both = control.attach(unet, weights, again, params)
    nets = networks_unet.load(config, base)
    _, ours = tasks_unet.controlled(config, nets, {})
    forward = jax.jit(lambda module, *args: module.apply(*args), static_argnums=0)
    args = batch["x"], jnp.full((8,), 500), batch["cond"]
    trained = {"params": {"base": fit.frozen["base"], "control": fit.state.ema}}
    expected = forward(ours, trained, *args)
    np.testing.assert_array_equal(forward(module, {"params": both}, *args), expected)


@pytest.mark.slow
def test_the_picture_of_a_controller_shows_its_hints(run):
    config, fit, *_ = run
    picture = fit.task.sample(fit.state.ema, fit.frozen, fit.encoders)
    assert picture.shape == (6 * tiny_sd.SIDE, 8 * tiny_sd.SIDE, 3)
    rows = picture.reshape(6, tiny_sd.SIDE, 8, tiny_sd.SIDE, 3)
    assert set(np.unique(rows[::3])) == {0, 255}  # hints, what was drawn, scenes
    scenes = np.concatenate(rows[2::3].swapaxes(1, 2))
    np.testing.assert_array_equal(scenes, inputs.shown(config, ("image", "hint"))["image"])


def test_the_planner_says_that_it_plans_the_train_step_alone(base, capsys):
    found = plan.report(config_of(base), SimpleNamespace(what="both", memory=False))
    assert found.keys() == {"train"}
    assert "sampling: planned for PixArt's pipelines only" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="only the steps of PixArt's tasks can be measured"):
        measure.report(config_of(base))


def test_controlnet_is_the_same_recipe(base):
    """One switch; it starts as a copy of the base's encoder with nothing added."""
    config = config_of(base)
    config.control.kind = "controlnet"
    validate.check(config)
    task = loop.build_task(config)
    _, weights = cnxs_jax.load_model(base, "unet")
    np.testing.assert_array_equal(
        task.params["mid_block"]["resnets_0"]["conv1"]["kernel"],
        weights["mid_block"]["resnets_0"]["conv1"]["kernel"],
    )
    zeros = [v for k, v in trees.flatten(task.params).items() if k.startswith("controlnet_")]
    assert len(zeros) > 8
    loader = loop.build_task(config_of(base)).loader  # the same pictures, hints and texts
    mine, theirs = raw_batch(task), next(loader)
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name])


@pytest.mark.parametrize("kind", ["base", "xl"])
def test_the_condition_is_the_pipelines(kind, request_of, request):
    """Text, pooled text, sizes and what takes their place, of kept and of dropped captions."""
    path = request.getfixturevalue(kind)
    config = config_of(path)
    nets, tokenizers, _, empty = tasks_unet.opened(config, path)
    pipe = cnxs_jax.load_pipeline(path)
    captions = ["a boat", "a red fox"]
    expected = pipe.encode(request_of(captions), (16, 16))
    raw = inputs.tokens(config, None, captions, networks_unet.tokenizing(tokenizers))
    raw["image"] = np.zeros((2, 16, 16, 3), np.uint8)
    made = jax.jit(
        lambda rate: networks_unet.condition(
            nets, nets.encoders, raw, empty, rate, jax.random.key(0)
        )
    )
    kept, dropped = made(0.0), made(1.0)
    assert kept.keys() == {k for k in expected if k not in ("null", "guidance_scale")}
    for name, value in kept.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)
    for name, value in expected["null"].items():
        np.testing.assert_allclose(dropped[name], value, atol=1e-6, err_msg=name)
    assert nets.zero_null == (kind == "xl")


@pytest.fixture
def request_of():
    """Makes a checked call of a pipeline."""

    def make(captions):
        return requests.check(captions, None, 2, 7.5, None, None, 1, 0, None, "np")

    return make


# --- control pictures -------------------------------------------------------------------------


def hinted(name, size=32, path=None):
    config = configs.controlnet_xs.get_config("tiny")
    config.data.update({"source": "shapes", "size": size, "hint": name, "hint_path": path})
    return inputs.open_source(config)


@pytest.mark.parametrize("name", hints.HINTS)
def test_hints_are_pictures_in_the_range_of_bytes(name, tmp_path):
    write = {"hed": detector.write, "midas": estimator.write}.get(name)
    source = hinted(name, path=None if write is None else str(write(tmp_path)))
    example = source[3]
    assert example["hint"].dtype == np.uint8
    assert example["hint"].shape == (32, 32, 3)
    assert example["hint"].max() > 100
    assert example["hint"].std() > 5
    np.testing.assert_array_equal(source[3]["hint"], example["hint"])  # again the same
    if name == "lines":
        np.testing.assert_array_equal(example["hint"][..., 0] == 255, example["edges"])
    if name == "depth":
        np.testing.assert_array_equal(example["hint"][..., 1], 85 * example["depth"])


# --- configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("control.kind", "controlnet-xs", 'Did you mean "controlnet_xs"'),
        ("control.control_type", "D", "unknown value 'D'"),
        ("control.size_ratio", 0.1, "either size_ratio or block_out_channels"),
        ("control.block_out_channels", None, "either size_ratio or block_out_channels"),
        ("control.time_embedding_mix", 0.0, "needs an embedding to mix in"),
        ("data.hint", "edges", "unknown value 'edges'"),
        ("data.hint", None, "unknown value None"),
        ("data.hint", "midas", r"needs the weights of its network.*\n.*Intel/dpt-hybrid-midas"),
        ("data.hint_path", "HED.pth", "lines has no weights"),
        ("data.source", "image_folder", "has no exact lines"),
        ("data.source", "features", "not cached features"),
        ("data.buckets", True, "pictures of one size"),
        ("freeze", (".*",), "frozen as it is"),
        ("objective.t_range", (900, 1100), "not inside"),
    ],
)
def test_bad_configs_of_a_controller_are_named(key, value, message):
    config = configs.controlnet_xs.get_config("tiny")
    config.data.hint = "lines"
    validate.check(config)
    *parents, last = key.split(".")
    place = config
    for name in parents:
        place = place[name]
    with config.unlocked(), config.ignore_type():
        place[last] = value
    with pytest.raises(ConfigError, match=message):
        validate.check(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("base_path", "nowhere", "no pipeline at"),
        ("data.max_length", 24, "pads texts to 77"),
        ("data.size", 17, "not a multiple of the VAE's 2"),
        ("objective.prediction", "v_prediction", "the pipeline predicts epsilon"),
        ("schedule.beta_end", 0.02, "another noise schedule"),
        ("control.conditioning_embedding_out_channels", (4, 6, 8), "4 pixels a latent"),
    ],
)
def test_what_does_not_fit_the_base_is_named(base, key, value, message):
    config = config_of(base)
    *parents, last = key.split(".")
    place = config
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises(ConfigError, match=message):
        loop.build_task(config)


def test_a_base_is_trained_on_from_a_pipeline():
    """The recipe's sizes are those of the shipped base, which it made."""
    config = loop.expand(configs.sd.get_config(), ROOT)
    config.init_path = str(ROOT / "cnxs_jax" / "assets" / "sd_tiny")
    params = loop.build_task(config).params
    assert params.keys() == {"unet", "text_encoder", "layout"}
    for part in ("unet", "text_encoder"):
        shipped = trees.flatten(cnxs_jax.load_model(config.init_path, part)[1])
        jax.tree.map(np.testing.assert_array_equal, trees.flatten(params[part]), shipped)
    config.unet.block_out_channels = (48, 96, 96)
    config.unet.attention_head_dim = (2, 3, 3)
    with pytest.raises(ConfigError, match="init_path"):
        loop.build_task(config)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"cross_attention_dim": 24}, "cross_attention_dim 24, the text encoder gives 16"),
        ("unet", {"in_channels": 4}, "in_channels 4, the VAE has 8"),
        ("unet", {"sample_size": 16}, "sample_size 16, 32 px give latents of 8"),
        ("text_encoder", {"vocab_size": 700}, "vocab_size 700 is less"),
        ("text_encoder", {"eos_token_id": 2}, "ends with 790"),
        ("text_encoder", {"max_position_embeddings": 16}, "pads texts to 16"),
    ],
)
def test_a_base_whose_parts_do_not_fit_is_named(part, change, message, tmp_path):
    config = loop.expand(configs.sd.get_config("smoke"), tmp_path)
    config[part].update(change)
    validate.check(config)
    with pytest.raises(ConfigError, match=message):
        loop.build_task(config)


def test_a_base_may_name_both_sides_of_its_latents(tmp_path):
    """Pictures of training are square, as the networks must be."""
    config = loop.expand(configs.sd.get_config("smoke"), tmp_path)
    with config.ignore_type():
        config.unet.sample_size = (8, 8)
        loop.build_task(config)
        config.unet.sample_size = (8, 4)
    with pytest.raises(ConfigError, match=r"sample_size \(8, 4\), 32 px give latents of 8"):
        loop.build_task(config)


def test_the_block_types_of_a_unet_are_checked():
    config = configs.sd.get_config("smoke")
    config.unet.attention_head_dim = (1, 0)
    with pytest.raises(ConfigError, match="0 is out of range"):
        validate.check(config)
    with config.ignore_type():
        config.unet.attention_head_dim = 2
        config.unet.down_block_types = (1, 2)
    with pytest.raises(ConfigError, match="1 is not a string"):
        validate.check(config)


# --- the published sizes ----------------------------------------------------------------------

# Parameters to train, of the base; width of the text. The released training code's figures.
SIZES = {
    "sd21": (14_186_356, 865_910_724, 1024),
    "sd15": (52_661_392, 859_520_964, 768),
    "sdxl": (20_177_984, 2_567_463_684, 2048),
}
NAMES = {"sd21": "sd21_14m", "sd15": "sd15_53m", "sdxl": "sdxl_20m"}


@pytest.mark.parametrize("variant", SIZES)
def test_the_figures_are_those_of_the_released_code(variant):
    config = configs.controlnet_xs.get_config(variant)
    validate.check(config)
    optimizer, xl = config.optimizer, variant == "sdxl"
    assert (optimizer.name, optimizer.weight_decay, optimizer.schedule) == (
        "adamw",
        0.01,
        "constant",
    )
    assert (optimizer.learning_rate, optimizer.clip_norm) == ((1e-4, 0.01) if xl else (1e-5, None))
    assert (config.data.size, config.data.hint, config.steps) == (512, "canny", 500_000)
    assert (config.schedule.beta_start, config.schedule.beta_end) == (0.00085, 0.012)
    assert config.objective.prediction == "epsilon"


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * (v != "sd21")) for v in SIZES]
)
def test_state_and_batch_build_on_shapes(variant):
    """The adapter has the published number of parameters, alone; nothing is allocated."""
    config = configs.controlnet_xs.get_config(variant)
    config.batch_size = 2
    adapter, base, width = SIZES[variant]
    task, module, shapes = abstract.built(config)
    state, batch = shapes["state"], shapes["batch"]
    assert trees.size(state.params) == trees.size(state.ema) == adapter
    assert {str(v.dtype) for v in jax.tree.leaves(state.params)} == {"float32"}
    assert trees.size(state.opt_state) < 2 * adapter + 8
    assert trees.size(shapes["frozen"]) == base
    assert {str(v.dtype) for v in jax.tree.leaves(shapes["frozen"])} == {"bfloat16"}
    assert batch["x"].shape == (2, 64, 64, 4)
    assert batch["cond"]["hint"].shape == (2, 512, 512, 3)
    assert batch["cond"]["text"].shape == (2, 77, width)
    assert ("pooled" in batch["cond"]) == (variant == "sdxl")
    published = layouts.PUBLISHED[NAMES[variant]]
    for name, value in published.items():
        per_level = module.control.per_level
        assert per_level(getattr(module.control, name)) == per_level(value), name


# --- from start to end ------------------------------------------------------------------------


def train(recipe, workdir, *flags):
    """The command line on one device, as people run it."""
    command = [sys.executable, "-m", "train", f"--config=configs/{recipe}", f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line["loss"] for line in log.read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.slow
def test_base_and_controller_from_start_to_end(tmp_path):
    """`configs/sd.py:smoke`, then `configs/controlnet_xs.py:smoke` on it, and both together."""
    losses = train("sd.py:smoke", tmp_path / "sd")
    assert len(losses) == 6
    base = tmp_path / "sd" / "export"
    pipe = cnxs_jax.load_pipeline(base)
    options = {"num_inference_steps": 2, "output_type": "np"}
    plain = pipe("a red book", **options).images
    assert plain.shape == (1, 32, 32, 3)
    losses = train("controlnet_xs.py:smoke", tmp_path / "xs", f"--config.base_path={base}")
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    pipe = cnxs_jax.load_pipeline(base, control=tmp_path / "xs" / "export" / "controlnet")
    hint = np.zeros((32, 32, 3), np.float32)
    hint[8:20, 8] = 1.0
    drawn = pipe("a red book", image=hint, **options).images
    off = pipe("a red book", image=hint, controlnet_conditioning_scale=0.0, **options).images
    assert np.abs(drawn - plain).max() > 1e-6
    np.testing.assert_allclose(off, plain, atol=1e-5)

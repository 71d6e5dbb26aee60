"""eDiff-I's recipes: the whole plan at its smallest, its report, controls, the published sizes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import cnxs_jax
import configs.ediffi
from cnxs_jax import tree as trees
from cnxs_jax.diffusion.expert_tree import LogNormal, Mixture, cover
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.pixel_unet import PixelUNet
from cnxs_jax.pipelines.base import Component
from eval.ediffi import experts
from tests.train.test_recipes import train
from train import ediffi_finish, loop, parts, tasks_ediffi, validate, workdir


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Workdir of `configs/scene_clip.py:smoke`."""
    return train("scene_clip.py:smoke", tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Workdir of `configs/ediffi.py:smoke`."""
    return train("ediffi.py:smoke", tmp_path_factory.mktemp("ediffi"))


def smoke(name, root, clip=None):
    config = configs.ediffi.get_config("smoke")[name]
    config.clip_path = None if clip is None else str(clip / "export")
    return loop.expand(config, root)


@pytest.mark.slow
def test_the_clip_recipe_gives_what_the_cascade_reads(clip):
    config = configs.ediffi.get_config("smoke").sr32
    config.clip_path = str(clip / "export")
    task = loop.build_task(loop.expand(config, clip))
    batch = task.encode(task.encoders, next(task.loader), jax.random.key(0))
    shapes = {k: v.shape for k, v in batch["cond"].items()}
    assert batch["x"].shape == (8, 16, 16, 3)  # a crop of half the side
    assert shapes["low_res"] == (8, 8, 8, 3)
    assert shapes["text"] == (8, 24, 128)
    assert shapes["clip_text"] == (8, 24, 16)
    assert shapes["pooled"] == shapes["clip_image"] == (8, 16)
    shapes = jax.eval_shape(task.params, jax.random.key(0))
    assert {"text_proj", "clip_text_proj", "clip_image_proj"} <= set(shapes["context"])


@pytest.mark.slow
def test_the_plan_trains_every_stage_and_joins_them(run):
    report = json.loads((run / "report.json").read_text())
    assert set(report["losses"]) == {"base"}
    found = report["losses"]["base"]
    names = [row["expert"] for row in found["bins"]]
    assert names == ["E[3,0]", "C[0.125,0.75]", "C[0.125,0.75]", "E[2,3]"]
    edges = [row["quantiles"] for row in found["bins"]]
    assert edges == [[0, 0.125], [0.125, 0.5], [0.5, 0.75], [0.75, 1]]
    mass = np.array([b - a for a, b in edges])
    losses = np.array([row["result"] for row in found["bins"]])
    assert np.isfinite(losses).all()
    assert found["total"]["result"] == pytest.approx(float(mass @ losses), rel=1e-6)
    text = (run / "report.md").read_text()
    assert "E[2,3]" in text
    with Image.open(run / "pictures.png") as picture:
        assert picture.size == (8 * 32, 32)


@pytest.mark.slow
def test_the_result_is_a_cascade_of_experts(run):
    pipe = cnxs_jax.load_pipeline(run / "export")
    assert [stage.size for stage in pipe.stages] == [16, 32]
    assert [len(stage.experts) for stage in pipe.stages] == [3, 1]
    first, _, last = (expert.params for expert in pipe.stages[0].experts)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first, last)
    assert max(jax.tree.leaves(moved)) > 0
    for name, expert in zip(configs.ediffi.EXPERTS, pipe.stages[0].experts, strict=True):
        _, own = cnxs_jax.load_model(run / name / "export" / "expert_0")
        jax.tree.map(np.testing.assert_array_equal, own, expert.params)


@pytest.mark.slow
def test_a_finished_plan_is_left_alone(run):
    before = (run / "report.md").stat().st_mtime_ns, (run / "export").stat().st_mtime_ns
    loop.main(configs.ediffi.get_config("smoke"), run, resume=True)
    assert before == ((run / "report.md").stat().st_mtime_ns, (run / "export").stat().st_mtime_ns)


@pytest.mark.slow
def test_copies_of_the_parent_have_its_loss_in_every_interval(run):
    """The same noises reach both: an ensemble that has not trained differs by nothing."""
    config = loop.expand(configs.ediffi.get_config("smoke"), run)
    entry = ediffi_finish.resolutions(config, run)[0]
    parent = entry["parent"].experts[0]
    copies = (Component(parent.module, jax.tree.map(jnp.array, parent.params)),) * 3
    same = {**entry, "result": entry["result"].__class__(
        "base", 16, copies, entry["result"].intervals
    )}  # fmt: skip
    found = ediffi_finish.compared(config, same)
    assert [row["ratio"] for row in found["bins"]] == [1.0] * 4
    trained = ediffi_finish.compared(config, entry)
    assert any(row["ratio"] != 1.0 for row in trained["bins"])


def test_parent_and_result_are_compared_at_the_same_noise(monkeypatch):
    """Where they were trained on other levels, at those of the result."""
    config = configs.ediffi.get_config("smoke")
    stages = [
        tasks_ediffi.stage_of(config.shared, [Component(name, {})]) for name in ("parent", "result")
    ]
    stages[0] = dataclasses.replace(stages[0], levels=LogNormal(mean=0.0, std=1.4))
    seen = []
    monkeypatch.setattr(ediffi_finish, "heldout", lambda *_: [])
    monkeypatch.setattr(
        ediffi_finish,
        "interval_losses",
        lambda stage, cuts, *_: seen.append(stage.levels) or np.ones(len(cuts)),
    )
    entry = {"stages": ["shared"], "parent": stages[0], "result": stages[1]}
    rows = ediffi_finish.compared(config, entry)["bins"]
    assert seen == [stages[1].levels] * 2
    assert rows[0]["sigma"][1] == pytest.approx(np.exp(-1.2))  # the median


def test_pictures_shrink_by_means_and_crops_of_both_sizes_agree():
    rng = np.random.default_rng(0)
    pictures = jnp.asarray(rng.normal(size=(5, 16, 16, 3)), jnp.float32)
    low = tasks_ediffi.shrunk(pictures, 8)
    np.testing.assert_allclose(low[1, 2, 3], pictures[1, 4:6, 6:8].mean((0, 1)), rtol=1e-5)
    large, small = tasks_ediffi.cropped(pictures, low, 8, jax.random.key(1))
    assert large.shape == (5, 8, 8, 3)
    np.testing.assert_allclose(tasks_ediffi.shrunk(large, 4), small, rtol=1e-5, atol=1e-6)
    places = {str(np.argwhere(np.isclose(low[i], small[i, 0, 0]).all(-1))) for i in range(5)}
    assert len(places) > 1  # not always the same corner


def test_a_mixture_draws_its_intervals_at_their_shares():
    levels, intervals = LogNormal(), cover(configs.ediffi.THREE_TREE)
    shares = configs.ediffi.get_config("mixed_three").longer.mix
    mixture = Mixture(levels, intervals, shares)
    keys = jax.random.split(jax.random.key(0), 20_000)
    quantile = levels.quantile(jax.vmap(mixture.draw)(keys))
    got = [np.mean((quantile >= i.low) & (quantile < i.high)) for i in intervals]
    np.testing.assert_allclose(got, np.array(shares) / 32, atol=0.015)
    middle = quantile[(quantile >= 0.125) & (quantile < 0.75)]
    assert np.mean(middle < 0.4375) == pytest.approx(0.5, abs=0.02)  # the parent's own density


@pytest.mark.parametrize(("mix", "variant"), [("mixed", "tiny"), ("mixed_three", "three")])
def test_a_mix_sees_the_levels_that_the_experts_see(mix, variant, tmp_path, monkeypatch):
    """Pictures an expert times the levels it is trained on, margins too, in each sixteenth."""
    drawn = []
    monkeypatch.setattr(tasks_ediffi, "edm_denoise", lambda _, levels, **k: drawn.append(levels))
    ensemble, one = (configs.ediffi.get_config(name) for name in (variant, mix))
    one.longer.clip_path = None
    loop.build_task(loop.expand(one.longer, tmp_path))
    edges = np.linspace(0, 1, 17)
    wanted = np.zeros(16)
    for name in ensemble.stages[1:]:
        stage = ensemble[name]
        interval = cover(stage.tree)[stage.expert]
        low, high = interval.low - 1 / 16, interval.high + 1 / 16  # what the recipe promises
        inside = (edges[:-1] >= low - 1e-9) & (edges[1:] <= high + 1e-9)
        wanted += stage.steps * stage.batch_size * inside / inside.sum()
    keys = jax.random.split(jax.random.key(0), 20_000)
    quantile = LogNormal().quantile(jax.vmap(drawn[0].draw)(keys))
    got = np.histogram(quantile, edges)[0] / 20_000
    np.testing.assert_allclose(got, wanted / wanted.sum(), atol=0.006)


def test_experts_and_one_model_in_small_batches_are_updated_alike():
    one = configs.ediffi.get_config("updates").longer
    for variant in ("tiny", "three", "no_margin", "halves", "quarters"):
        config = configs.ediffi.get_config(variant)
        steps = sum(config[n].steps for n in config.stages[1:])
        assert steps == pytest.approx(one.steps, rel=0.1)


def test_controls_and_experts_side_by_side_are_one_key_away(tmp_path):
    """`mix` is one model; a tree without `expert` is as many experts as it has."""
    for name, count in (("mixed", None), ("parallel", 3), ("updates", None)):
        config = configs.ediffi.get_config(name)
        stage = config[config.stages[-1]]
        stage.clip_path = None
        task = loop.build_task(loop.expand(stage, tmp_path))
        assert task.experts == count
        assert task.frozen["interval"].shape == ((3, 2) if count else (2,))
        assert task.parent == str(tmp_path / "shared")
        assert (task.sample is None) == (count is not None)


@pytest.mark.parametrize("variant", ["tiny", "three", "halves", "quarters", "parallel"])
def test_margins_are_a_sixteenth_of_all_levels(variant):
    config = configs.ediffi.get_config(variant)
    branches = [config[name] for name in config.stages[1:]]
    intervals, margins = cover(branches[0].tree), [b.margin for b in branches]
    if variant == "parallel":
        margins = margins[0]
    else:
        assert [b.expert for b in branches] == list(range(len(intervals)))
    for one, margin in zip(intervals, margins, strict=True):
        assert margin * one.mass == pytest.approx(1 / 16)


def test_one_margin_serves_all_experts():
    """As a number, or as the command line gives it."""
    found = tasks_ediffi.widened(cover(((1, 0), (1, 1))), (0.25,))
    assert found == tasks_ediffi.widened(cover(((1, 0), (1, 1))), 0.25)
    assert found == [(0.0, 0.625), (0.375, 1.0)]


def test_arms_see_as_many_samples():
    def samples(variant):
        config = configs.ediffi.get_config(variant)
        return sum(config[n].steps * config[n].batch_size for n in config.stages)

    assert {samples(variant) for variant in experts.ARMS.values()} == {64_000}


def test_the_published_sizes_can_be_built():
    """Parameters in millions, as the recipe's head has them."""
    config = configs.ediffi.get_config("paper")
    counts = {}
    for name in ("shared", "sr256", "sr1024"):
        stage = config[name]
        unet = parts.make(PixelUNet, stage.unet)
        side = stage.crop or stage.size
        cond = {"text": jnp.zeros((1, 113, 4096))}
        if stage.low_res_size:
            cond["low_res"] = jnp.zeros((1, 64, 64, 3))
        x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        shapes = jax.eval_shape(unet.init, jax.random.key(0), x, jnp.zeros(1), cond)["params"]
        counts[name] = trees.size(shapes) / 1e6
        own = [path for path in trees.flatten(shapes) if "/attn1/" in path]
        assert bool(own) == (name != "sr1024")  # no self-attention at 1024 px
        assert stage.data.size >= 224  # CLIP's own pictures
    assert counts == pytest.approx({"shared": 583, "sr256": 403, "sr1024": 155}, abs=0.5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shared", {"size": 24}, "each must divide"),
        ("shared", {"crop": 8}, "only super-resolution"),
        ("sr32", {"crop": 15}, "do not cover whole pixels"),
        ("sr32", {"low_res_size": None, "crop": None}, "belong together"),
        ("low", {"expert": 3}, "expert 3 of 3"),
        ("low", {"ema_warmup": True}, "would forget the average"),
        ("low", {"tree": ((1, 1), (2, 3))}, "overlap"),
        ("low", {"expert": None, "mix": (1, 2)}, "2 shares for 3 experts"),
        ("low", {"margin": (0.1, 0.1)}, "2 margins for 3 experts"),
        ("low", {"sampler.solver": "deis", "sampler.sigma_max": 0.001}, "got 0.002, 0.001"),
        ("shared", {"sampler.sigma_min": 90.0}, "sigma_min < sigma_max .* got 90"),
    ],
)
def test_bad_stages_are_named(name, change, message):
    config = configs.ediffi.get_config("smoke")[name]
    config.update_from_flattened_dict({k: v for k, v in change.items() if "." in k})
    values = config.to_dict() | {k: v for k, v in change.items() if "." not in k}
    with pytest.raises(ConfigError, match=message):
        validate.check_stage(values, "config")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (("shared", "low", "high", "sr32"), r"train the experts \[0, 2\]"),
        (("shared", "low", "low", "middle", "high"), r"\[0, 0, 1, 2\]"),
    ],
)
def test_a_plan_must_train_each_expert_once(stages, message):
    config = configs.ediffi.get_config("smoke")
    for name in set(config.stages) - set(stages):
        del config[name]
    config.stages = stages
    with pytest.raises(ConfigError, match=message):
        validate.check(config)


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("sr32", "clip_path", "another"),
        ("low", "text_path", "another"),
        ("high", "levels.mean", 0.0),
        ("middle", "sampler.steps", 4),
    ],
)
def test_stages_of_one_pipeline_agree(stage, key, value):
    config = configs.ediffi.get_config("smoke")
    config.update_from_flattened_dict({f"{stage}.{key}": value})
    with pytest.raises(ConfigError, match="one pipeline") as refused:
        validate.check(config)
    assert refused.value.where == f"config.{stage}.{key}"


@pytest.mark.parametrize("solver", ["deis", "ab", "dpmpp", "euler"])
def test_every_solver_samples_the_recipe(solver):
    """With the recipe's order, or the highest that the solver has."""
    config = configs.ediffi.get_config("smoke").shared
    config.sampler.solver = solver
    validate.check_stage(config.to_dict(), "config")
    table = tasks_ediffi.Sampler(**config.sampler.to_dict()).table()
    assert table.b.shape[-1] == {"dpmpp": 2, "euler": 1}.get(solver, 3)


def finished(root, config):
    """The marks that finished stages leave."""
    for name in config.stages:
        (root / name / "checkpoints" / str(config[name].steps)).mkdir(parents=True)
        (root / name / "export").mkdir()
        (root / name / "config.json").write_text(json.dumps(workdir.plain(config[name])))


def test_a_parent_does_not_go_on_under_its_branches(tmp_path, monkeypatch):
    config = configs.ediffi.get_config("smoke")
    finished(tmp_path, config)
    runs = [(tmp_path / name, config[name]) for name in config.stages]

    def check(done):
        workdir.check_branches(runs, [done(name) for name in config.stages], tmp_path)

    check(lambda name: True)
    check(lambda name: name == "shared")  # the branches alone go on
    config.shared.steps = 6
    with pytest.raises(ConfigError, match="low started from shared, .* 3 of 6 steps"):
        loop.main(config, tmp_path, resume=True)
    for name in set(config.stages) - {"shared"}:
        shutil.rmtree(tmp_path / name / "checkpoints")
    with pytest.raises(ConfigError, match="low started from shared"):
        loop.main(config, tmp_path, resume=True)  # their results are there
    check(lambda name: False)  # nothing is: a plan that was stopped in its first stage
    (tmp_path / "high" / "checkpoints" / "3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config.high.parent = "shared"
    with pytest.raises(ConfigError, match="high started from shared"):
        check(lambda name: False)
    alone = config.shared  # goes on where it lies, and has no parent
    workdir.check_branches([(tmp_path, alone)], [False], tmp_path)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    workdir.check_branches([(tmp_path, alone)], [False], tmp_path)


def test_a_network_that_does_not_fit_its_encoders_is_named(tmp_path):
    config = smoke("shared", tmp_path)
    config.unet.text_dim = 64
    with pytest.raises(ConfigError, match="text_dim 64, but the encoder gives 128"):
        loop.build_task(config)


@pytest.mark.parametrize(
    ("settings", "cores", "batch", "expected"),
    [({}, 2, 4, 2), ({}, 1, 4, 1), ({}, 2, 3, 1), ({"JAX_NUM_CPU_DEVICES": "3"}, 2, 4, 3)],
)
def test_a_device_a_core_where_the_batches_divide(settings, cores, batch, expected):
    """Unless the environment says otherwise; those of the recipes go by two."""
    code = (
        "import os; from ml_collections import ConfigDict; from train.__main__ import use_cores\n"
        f"os.sched_getaffinity = lambda _: set(range({cores}))\n"
        f"runs = {{'a': {{'batch_size': {batch}, 'grad_accum': 1}}, 'stages': ('a', 'b'),\n"
        "  'b': {'batch_size': 16, 'grad_accum': 2}, 'cpu_devices': 2}\n"
        "use_cores(ConfigDict(runs)); import jax; print(jax.device_count())"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | settings, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(expected), done.stderr[-2000:]
    for variant in configs.ediffi.VARIANTS:
        config = configs.ediffi.get_config(variant)
        devices = config.get("cpu_devices") or 1
        assert all(config[name].batch_size % devices == 0 for name in config.stages)

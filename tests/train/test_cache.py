"""Cached features: the losses of a run on the fly, shards, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import cnxs_jax
import configs.pixart_lcm
from cnxs_jax.data import features, image_folder, pipeline
from cnxs_jax.errors import ConfigError, DataError
from tests.control import detector, estimator
from tests.pipelines import tiny
from tests.train.test_control_tasks import control_config, lora_config
from train import cache, log, loop, networks, optimizer, report
from train.step import init_state, make_step

pytestmark = pytest.mark.filterwarnings("ignore:caption has")
CAPTIONS = ("a red fox", "two blue cats", "a boat")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a tiny random pipeline."""
    path = tmp_path_factory.mktemp("base")
    cnxs_jax.save_pipeline(tiny.pipeline(path / "tokens"), path / "pipeline")
    return path / "pipeline"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten pictures of noise with captions of different lengths."""
    path, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for n in range(10):
        Image.fromarray(rng.integers(0, 256, (20, 18 + n, 3), np.uint8)).save(path / f"{n}.png")
        (path / f"{n}.txt").write_text(CAPTIONS[n % 3])
    return path


def distill_config(base, photos):
    config = lora_config(base)
    config.lora = None
    config.data.update(source="image_folder", root=str(photos))
    return config


def hed_config(base, photos):
    """A controller on HED edges of photographs, with a random detector."""
    config = control_config(base)
    weights = str(detector.write(photos.parent / "hed"))
    config.data.update(
        source="image_folder", root=str(photos), hint="hed", hint_path=weights
    )  # fmt: skip
    return config


def cached(config, root):
    """The same run on the features in `root`."""
    config = config.copy_and_resolve_references()
    config.data.update(source="features", root=str(root))
    return config


def losses(config, updates=False, steps=3):
    """The losses of the first batches on one device; the parameters move with `updates`."""
    task = loop.build_task(config)
    params = task.params(jax.random.key(1)) if callable(task.params) else task.params
    tx = optimizer.make_optimizer(config.optimizer, config.steps)
    state, found = init_state(params, tx), []
    step = jax.jit(make_step(task.objective, tx, 0.5))
    objective, encode = jax.jit(task.objective), jax.jit(task.encode)
    for n in range(steps):
        raw = {k: v for k, v in next(task.loader).items() if loop.is_numeric(v)}
        batch = encode(task.encoders, raw, jax.random.key(n))
        if updates:
            state, metrics = step(state, task.frozen, batch, jax.random.key(7))
            found.append(float(metrics["loss"]))
        else:
            loss, _ = objective(state.params, state.ema, task.frozen, batch, jax.random.key(n))
            found.append(float(loss))
    return np.array(found)


@pytest.mark.parametrize(
    ("kind", "updates"),
    [
        ("distill", False),
        pytest.param("distill", True, marks=pytest.mark.slow),
        pytest.param("controller", True, marks=pytest.mark.slow),
        pytest.param("hed", True, marks=pytest.mark.slow),
    ],
)
def test_losses_on_cached_features_are_those_on_the_fly(base, photos, tmp_path, kind, updates):
    config = {"distill": distill_config, "hed": hed_config}.get(kind, control_config)(
        *(base,) if kind == "controller" else (base, photos)
    )
    if kind == "controller":
        config.data.num_examples = 12
    expected = losses(config, updates)
    assert np.unique(expected).size == 3
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 1e-2)):
        root = tmp_path / dtype
        number = cache.write(config, root, features.Shard(0, 1), dtype, 4)
        assert number == (12 if kind == "controller" else 10)
        found = losses(cached(config, root), updates)
        difference = np.abs(found / expected - 1).max()
        assert difference <= bound
        assert dtype == "float32" or difference > 1e-7  # it did read the shorter numbers


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_a_whole_run_on_cached_features_repeats_the_other(base, photos, tmp_path, dtype, bound):
    """Command for command: the losses that two runs of six updates log."""
    config = distill_config(base, photos)
    config.steps = config.save_every = 6
    cache.write(config, tmp_path / "cache", features.Shard(0, 1), dtype)
    logged = []
    for name, own in (("fly", config), ("cached", cached(config, tmp_path / "cache"))):
        loop.main(own, tmp_path / name)
        lines = log.read_metrics(tmp_path / name / "metrics.jsonl")
        logged.append(np.array([line["loss"] for line in lines]))
    assert np.unique(logged[0]).size == 6
    difference = np.abs(logged[1] / logged[0] - 1).max()
    print(f"{dtype}: {difference:.1e}")
    assert difference <= bound


@pytest.mark.slow
def test_a_cached_run_writes_a_whole_pipeline(base, photos, tmp_path):
    """It loads no encoder; the export has copies of them."""
    config = distill_config(base, photos)
    config.steps = 1
    cache.write(config, tmp_path / "cache", features.Shard(0, 1))
    task = loop.build_task(cached(config, tmp_path / "cache"))
    assert set(task.encoders) == {"empty"}
    loop.main(cached(config, tmp_path / "cache"), tmp_path / "run")
    assert len(log.read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
    pipe = cnxs_jax.load_pipeline(tmp_path / "run" / "export")
    assert pipe.scheduler["_class_name"] == "LCMScheduler"
    _, before = cnxs_jax.load_model(base, "text_encoder")
    after = pipe.components["text_encoder"].params
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.fixture(scope="module")
def stored(base, photos, tmp_path_factory):
    """`(config, directory)` of a cache of three shards in aspect-ratio order of the folder."""
    root, config = tmp_path_factory.mktemp("cache"), distill_config(base, photos)
    for index in range(3):
        cache.write(config, root, features.Shard(index, 3), batch_size=4)
    return config, root


def test_examples_lie_where_they_were(stored, photos):
    _, root = stored
    source, folder = (
        pipeline.open_source("features", root=root),
        image_folder.ImageFolder(photos, 16),
    )
    assert len(source) == 10
    np.testing.assert_array_equal(source.original_sizes(), folder.original_sizes())
    for n in range(10):
        example = source[n]
        assert example["caption"] == folder[n]["caption"]
        assert example["mean"].shape == (8, 8, 4)
        assert example["text"].shape == (8, 16)
        length = int(example["text_mask"].sum())
        assert np.all(example["text"][length:] == 0)
        assert np.all(np.abs(example["text"][:length]).max(axis=1) > 0)
    assert len({int(source[n]["text_mask"].sum()) for n in range(3)}) > 1


def test_stale_features_are_refused(stored, tmp_path):
    config, root = stored
    changed = cached(config, root)
    changed.data.size = 32
    with pytest.raises(DataError, match="stale: size: cached 16, now 32"):
        loop.build_task(changed)
    other = tmp_path / "pipeline"
    shutil.copytree(config.teacher_path, other)
    file = next((other / "vae").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    changed = cached(config, root)
    changed.teacher_path = str(other)
    with pytest.raises(DataError, match="encoders.vae: cached .*now"):
        loop.build_task(changed)
    words = tmp_path / "words"
    shutil.copytree(config.teacher_path, words)
    with open(words / "tokenizer" / "tokenizer_config.json", "a") as file:
        file.write(" ")
    changed.teacher_path = str(words)
    with pytest.raises(DataError, match="encoders.tokenizer: cached .*now"):
        loop.build_task(changed)
    again = config.copy_and_resolve_references()
    again.teacher_path = str(other)
    with pytest.raises(DataError, match="features of other settings .*encoders.vae"):
        cache.write(again, root, features.Shard(0, 3))
    assert cache.write(config, root, features.Shard(0, 3)) == 0  # written before


def test_features_of_another_detector_are_refused(base, photos, tmp_path):
    config = hed_config(base, photos)
    cache.write(config, tmp_path / "cache", features.Shard(0, 1))
    changed = cached(config, tmp_path / "cache")
    changed.data.hint_path = str(detector.write(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match="stale: encoders.hed: cached .*now"):
        loop.build_task(changed)
    changed.data.hint, changed.data.hint_path = "canny", None
    with pytest.raises(DataError, match="stale: .*hed"):
        loop.build_task(changed)


def test_midas_weights_are_part_of_what_a_cache_was_made_with(base, photos, tmp_path):
    config, made = control_config(base), []
    for seed in (0, 0, 1):
        path = estimator.write(tmp_path / str(len(made)), seed)
        config.data.update(source="image_folder", root=str(photos), hint="midas")
        config.data.hint_path = str(path)
        made.append(networks.cache_settings(config, str(base), "hint")["encoders"])
    assert made[0] == made[1]
    assert {key for key in made[0] if made[0][key] != made[2][key]} == {"midas"}


def test_incomplete_and_mixed_caches_are_refused(stored, tmp_path):
    _, root = stored
    part = tmp_path / "part"
    shutil.copytree(root, part)
    (part / "features-00001-of-00003.json").unlink()
    with pytest.raises(DataError, match="1 of 3 shards are missing, first 1"):
        features.FeatureSource(part)
    shutil.copy(root / "features-00001-of-00003.json", part)
    manifest = json.loads((part / "features-00002-of-00003.json").read_text())
    manifest["encoders"]["text_encoder"] = "0" * 64
    (part / "features-00002-of-00003.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="of different caches .*encoders.text_encoder"):
        features.FeatureSource(part)
    with pytest.raises(DataError, match="no cached features"):
        features.FeatureSource(tmp_path)
    with pytest.raises(ConfigError, match="features needs a folder"):
        pipeline.open_source("features")


def test_part_of_the_features_and_of_the_pictures(stored, tmp_path):
    """`data.num_examples`: the first ones, whatever the source can do besides."""
    config, root = stored
    changed = cached(config, root)
    changed.data.num_examples = 8
    batch = next(loop.build_task(changed).loader)
    assert "mean" in batch
    few = config.copy_and_resolve_references()
    few.data.num_examples = 4
    assert cache.write(few, tmp_path, features.Shard(0, 1)) == 4
    folder = pipeline.First(image_folder.ImageFolder(config.data.root, 16), 4)
    assert len(folder.original_sizes()) == 4
    assert folder.read(1, 8, 24)["image"].shape == (8, 24, 3)


def test_a_run_on_features_needs_no_word_about_its_report(stored):
    config, root = stored
    changed = cached(config, root)
    changed.report = configs.pixart_lcm.get_config().report
    assert not report.wanted(changed)
    loop.build_task(changed)


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2"])
def test_a_shard_is_i_of_n(text):
    with pytest.raises(ConfigError, match="is no shard"):
        cache.parse_shard(text)
    assert cache.parse_shard("0/8") == features.Shard(0, 8)


def test_endless_data_needs_a_number(base):
    with pytest.raises(ConfigError, match="10,000,000 examples are too many"):
        cache.write(control_config(base), "unused", features.Shard(0, 1))

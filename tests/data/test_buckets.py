"""Buckets: PixArt's table, the nearest shape, no picture lost, exact resume."""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import configs.pixart_lcm
from cnxs_jax.data import buckets
from cnxs_jax.data.image_folder import ImageFolder
from cnxs_jax.errors import ConfigError, DataError
from cnxs_jax.models.dit import PixArt
from train import inputs, parts

SIZES = [(64, 64), (60, 64), (32, 128), (128, 32), (48, 64), (90, 30)]  # (height, width)


@pytest.fixture
def folder(tmp_path):
    """Fifty small pictures in six shapes; the caption is the picture's number."""
    for n in range(50):
        height, width = SIZES[n % len(SIZES)]
        Image.new("RGB", (width, height), (n, 0, 0)).save(tmp_path / f"{n:02}.png")
        (tmp_path / f"{n:02}.txt").write_text(str(n))
    return tmp_path


def loader(folder, **options):
    return buckets.BucketLoader(ImageFolder(folder, 0), 256, **{"batch_size": 4, **options})


def test_the_published_table():
    """40 shapes; corners and a few entries as PixArt-alpha's code has them."""
    found = buckets.table(1024)
    assert len(found) == 40
    some = {0.25: (512, 2048), 0.52: (704, 1344), 1.0: (1024, 1024), 1.29: (1152, 896),
            2.89: (1664, 576), 3.62: (1856, 512), 4.0: (2048, 512)}  # fmt: skip
    assert {ratio: found[ratio] for ratio in some} == some
    areas = np.array([h * w for h, w in found.values()]) / 1024**2
    assert areas.min() > 0.87
    assert areas.max() <= 1.0 + 1e-9


def test_shapes_are_multiples_of_vae_and_patch():
    for base in (256, 512, 1024):
        assert not np.any(np.array(list(buckets.table(base).values())) % 16)
    with pytest.raises(ConfigError, match="multiple of 256"):
        buckets.table(300)


def test_each_batch_has_one_shape_and_the_nearest_one(folder):
    stream = loader(folder)
    for _ in range(30):
        batch = next(stream)
        ratio = round(float(batch["aspect"][0, 0]), 2)
        height, width = buckets.table(256)[ratio]
        assert batch["image"].shape == (4, height, width, 3)
        for h, w in batch["original_size"]:
            assert abs(h / w - ratio) == min(abs(h / w - r) for r in buckets.table(256))
        # the number in the caption is the red of the picture: nothing was mixed up
        assert batch["image"][:, 0, 0, 0].tolist() == [int(c) for c in batch["caption"]]


def test_no_picture_is_lost_or_seen_twice_in_an_epoch(folder):
    stream, seen = loader(folder), collections.Counter()
    while stream.epoch < 6:
        seen.update(int(c) for c in next(stream)["caption"])
    waiting = collections.Counter(i for queue in stream.waiting.values() for i in queue)
    drawn = {i for i in map(int, stream.order[: stream.position])}
    for n in range(50):
        assert seen[n] + waiting[n] == 6 + (n in drawn)


def test_resume_is_exact(folder):
    stream = loader(folder)
    for _ in range(17):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream)["caption"] for _ in range(25)]
    again = loader(folder)
    again.set_state(state)
    assert [next(again)["caption"] for _ in range(25)] == expected


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """Three pictures in each of the 40 shapes, an eighth of its size; noise: no two agree."""
    path, rng = tmp_path_factory.mktemp("forty"), np.random.default_rng(0)
    for n, (height, width) in enumerate(list(buckets.table(256).values()) * 3):
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{n:03}.png")
        (path / f"{n:03}.txt").write_text(str(n))
    return path


def test_forty_shapes_are_compiled_once_and_no_picture_is_lost(forty):
    """Pairs of three: one of each shape waits for the next epoch. Then nothing is new."""
    stream, seen, traced = loader(forty, batch_size=2), collections.Counter(), []

    @jax.jit
    def step(image, aspect):
        traced.append(image.shape)
        return image.astype(jnp.float32).mean() * aspect.mean()

    while stream.epoch < 2:  # a first pass meets every shape
        batch = next(stream)
        step(batch["image"], batch["aspect"])
        seen.update(int(c) for c in batch["caption"])
    shapes = {shape[1:3] for shape in traced}
    assert shapes == set(buckets.table(256).values())
    assert len(traced) == step._cache_size() == 40
    while stream.epoch < 6:
        batch = next(stream)
        step(batch["image"], batch["aspect"])
        seen.update(int(c) for c in batch["caption"])
    assert len(traced) == step._cache_size() == 40
    waiting = collections.Counter(i for queue in stream.waiting.values() for i in queue)
    drawn = {int(i) for i in stream.order[: stream.position]}
    assert all(seen[n] + waiting[n] == 6 + (n in drawn) for n in range(120))


def test_resume_amid_forty_shapes_is_exact(forty):
    """Pictures to the bit, with pictures of many shapes waiting."""
    stream = loader(forty, batch_size=2)
    for _ in range(31):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    assert len(state["waiting"]) > 10
    again = loader(forty, batch_size=2)
    again.set_state(state)
    for _ in range(60):
        expected, found = next(stream), next(again)
        assert found["caption"] == expected["caption"]
        for name in ("image", "aspect", "original_size"):
            np.testing.assert_array_equal(found[name], expected[name])


def test_processes_share_the_batches_of_one(folder):
    one = loader(folder)
    two = [loader(folder, rows=(2 * i, 2 * i + 1)) for i in range(2)]
    for _ in range(20):
        whole = next(one)["caption"]
        assert [c for part in two for c in next(part)["caption"]] == whole


def test_another_stream_is_refused(folder):
    state = loader(folder).get_state()
    (folder / "00.txt").write_text("changed")
    with pytest.raises(DataError, match="another data stream"):
        loader(folder).set_state(state)
    with pytest.raises(DataError, match="batch_size"):
        loader(folder, batch_size=2).set_state(state)


def test_training_reads_buckets_and_their_micro_conditioning(folder):
    """`size` is the file's own, `aspect` the bucket's ratio (PixArt-alpha's training code)."""
    config = configs.pixart_lcm.get_config("xl_256")
    config.batch_size = 4
    config.data.update(source="image_folder", root=str(folder), buckets=True)
    stream, _ = inputs.open_loader(config, tokens=False)
    batch = next(stream)
    given = parts.sizes_of(PixArt(sample_size=128), batch)
    np.testing.assert_array_equal(given["size"], batch["original_size"])
    ratio = round(float(given["aspect"][0, 0]), 2)
    assert batch["image"].shape[1:3] == buckets.table(256)[ratio]


def test_buckets_need_a_folder():
    config = configs.pixart_lcm.get_config("xl_256")
    config.data.buckets = True
    with pytest.raises(ConfigError, match="several shapes"):
        inputs.open_loader(config, tokens=False)

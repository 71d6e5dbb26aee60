"""Weight files in PyTorch's old format: the real one is read, damaged and hostile ones refused."""

import os
import pickle

import numpy as np
import pytest

from cnxs_jax.errors import CheckpointError
from eval.metrics import features, weights


@pytest.fixture(scope="module")
def published():
    """The bytes of a real file of this format."""
    return features.weights_path().read_bytes()


def refused(tmp_path, data, match=None):
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        weights.read(path)


def test_a_real_file_is_read(published):
    tensors = weights.read(features.weights_path())
    assert tensors["_conv_stem.weight"].shape == (32, 3, 3, 3)
    parameters = [t for k, t in tensors.items() if "running_" not in k and "tracked" not in k]
    assert sum(t.size for t in parameters) == 4652008  # the published count
    assert all(np.isfinite(t).all() for t in tensors.values())
    assert tensors["_bn0.running_var"].min() >= 0


def test_the_reader_builds_nothing_but_tensors(tmp_path):
    head = weights.MAGIC + b"".join(pickle.dumps(x, 2) for x in (1001, {"little_endian": True}))
    refused(tmp_path, head + pickle.dumps(os.getcwd, 2), "getcwd")
    refused(tmp_path, head + pickle.dumps({"a": np.zeros(3)}, 2), "numpy")
    refused(tmp_path, pickle.dumps(os.getcwd, 2), "not a file of torch.save")
    refused(tmp_path, head + pickle.dumps({"a": 1}, 2) + pickle.dumps([], 2), "no tensors")


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path, published):
    for size in (2, 1000, 60_000, len(published) // 2, len(published) - 1):
        refused(tmp_path, published[:size])
    refused(tmp_path, published[: len(published) // 2], "cut short")


def test_changed_bytes_are_refused_or_change_numbers_only(tmp_path, published):
    """Whatever the header says, no other error and no array of another size comes out."""
    rng, path = np.random.default_rng(0), tmp_path / "w.pth"
    good = {k: v.shape for k, v in weights.read(features.weights_path()).items()}
    head, outcomes = bytearray(published[:400_000]), []
    for _ in range(40):
        bad = bytearray(head)
        bad[rng.integers(20, 40_000)] ^= 1 << rng.integers(8)
        path.write_bytes(bad + published[len(head) :] if len(outcomes) % 8 == 0 else bad)
        try:
            outcomes.append({k: v.shape for k, v in weights.read(path).items()} != good)
        except CheckpointError:
            outcomes.append(True)
    assert sum(outcomes) >= 35


def test_other_formats_go_to_the_other_reader(tmp_path):
    path = tmp_path / "w.pth"
    path.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="HTML"):
        weights.read(path)
    with pytest.raises(CheckpointError, match="No such file"):
        weights.read(tmp_path / "none.pth")


def test_folded_batch_norm_is_the_norm_after_the_convolution():
    rng = np.random.default_rng(0)
    tensors = {
        "a.conv.weight": rng.normal(size=(4, 3, 1, 1)),
        "a.bn.weight": rng.normal(size=4),
        "a.bn.bias": rng.normal(size=4),
        "a.bn.running_mean": rng.normal(size=4),
        "a.bn.running_var": rng.uniform(0.5, 2, 4),
        "fc.bias": rng.normal(size=2),
    }
    folded = weights.fold_batch_norms(tensors, 0.1)
    assert set(folded) == {"a.weight", "a.bias", "fc.bias"}
    x = rng.normal(size=(7, 3))
    y = x @ tensors["a.conv.weight"][:, :, 0, 0].T
    y = (y - tensors["a.bn.running_mean"]) / np.sqrt(tensors["a.bn.running_var"] + 0.1)
    y = y * tensors["a.bn.weight"] + tensors["a.bn.bias"]
    ours = x @ folded["a.weight"][:, :, 0, 0].T + folded["a.bias"]
    np.testing.assert_allclose(ours, y, rtol=1e-5, atol=1e-6)

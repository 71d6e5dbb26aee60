"""EfficientNet-Lite0 against the PyTorch package that published the weights' architecture."""

import jax
import numpy as np
import pytest

from eval.metrics import features

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("height", "width"), [(128, 128), (75, 98)])
def test_pooled_features_equal_torch(height, width):
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    x = np.random.default_rng(0).uniform(-1, 1, (3, height, width, 3)).astype(np.float32)
    network = EfficientNet.from_name("efficientnet-lite0", image_size=None)  # true SAME padding
    network.load_state_dict(torch.load(features.weights_path(), weights_only=False))
    network.eval()
    with torch.no_grad():
        nchw = network.extract_features(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    theirs = nchw.mean((2, 3)).numpy()
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(features.EfficientNetLite0().apply)({"params": features.load()}, x)
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error <= 1e-5

"""VGG16 and LPIPS against PyTorch with random weights."""

import jax
import numpy as np
import pytest
import torch
from torch import nn

from eval.metrics import lpips, vgg

pytestmark = pytest.mark.parity
LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
TAPS = (3, 8, 15, 22, 29)  # the ReLUs that end the stages, as torchvision counts


def torch_vgg(seed=0):
    """`features` of torchvision's VGG16 up to relu5_3, He-scaled."""
    g, layers, channels = torch.Generator().manual_seed(seed), [], 3
    for width in LAYERS:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        conv = nn.Conv2d(channels, width, 3, padding=1)
        with torch.no_grad():
            conv.weight.normal_(0, (2 / (9 * channels)) ** 0.5, generator=g)
            conv.bias.uniform_(-0.1, 0.1, generator=g)
        layers += [conv, nn.ReLU()]
        channels = width
    return nn.Sequential(*layers)


def activations(features, x):
    found = []
    for i, layer in enumerate(features):
        x = layer(x)
        if i in TAPS:
            found.append(x)
    return found


@torch.no_grad()
def torch_lpips(features, heads, a, b):
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    total = 0
    pairs = zip(*(activations(features, (x - shift) / scale) for x in (a, b)), strict=True)
    for i, (p, q) in enumerate(pairs):
        p, q = (v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (p, q))
        head = torch.from_numpy(heads[f"lin{i}.model.1.weight"])
        total = total + nn.functional.conv2d((p - q) ** 2, head).mean((1, 2, 3))
    return total.numpy()


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def test_lpips_and_its_features_equal_pytorch():
    features, rng = torch_vgg(), np.random.default_rng(0)
    widths = (64, 128, 256, 512, 512)
    heads = {
        f"lin{i}.model.1.weight": rng.uniform(0, 1, (1, w, 1, 1)).astype(np.float32)
        for i, w in enumerate(widths)
    }
    tensors = {f"features.{k}": v.numpy() for k, v in features.state_dict().items()}
    tensors["classifier.0.weight"] = np.zeros((8, 8), np.float32)
    params = {"vgg": vgg.from_tensors(tensors), **lpips.heads_from_tensors(heads)}
    images = rng.integers(0, 256, (3, 45, 38, 3), dtype=np.uint8)
    noisy = np.clip(images + rng.normal(0, 30, images.shape), 0, 255).astype(np.uint8)
    a, b = (v.astype(np.float32) / np.float32(127.5) - 1 for v in (images, noisy))
    theirs = torch_lpips(features, heads, nchw(a), nchw(b))
    with jax.default_matmul_precision("highest"):
        ours = lpips.distance(params, batch_size=2)(images, noisy)
        same = lpips.distance(params, batch_size=2)(images, images)
        taps = jax.jit(vgg.VGG16().apply)({"params": params["vgg"]}, a)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"lpips: {error:.1e}")
    assert theirs.min() > 0.05
    assert error <= 1e-5
    assert (same == 0).all()
    with torch.no_grad():
        for ours_tap, tap in zip(taps, activations(features, nchw(a)), strict=True):
            tap = tap.numpy().transpose(0, 2, 3, 1)
            assert np.abs(ours_tap - tap).max() <= 1e-5 * np.abs(tap).max()

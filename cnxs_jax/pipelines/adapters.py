"""LoRA adapters of a pipeline's denoiser: opening them, and merging them into its weights."""

import numbers
import os

import jax
import numpy as np

from cnxs_jax import lora, sharding
from cnxs_jax import tree as trees
from cnxs_jax.convert import lora as lora_files
from cnxs_jax.convert import pixart, unet
from cnxs_jax.errors import CheckpointError, ConfigError

TABLES = {"transformer": pixart.DIFFUSERS, "unet": unet.DIFFUSERS}


def open_adapters(given, params, denoiser):
    """`([tree, ...], [scale, ...])` of adapters.

    Args:
        given: the path of a LoRA file or PEFT directory, an adapter tree (`cnxs_jax.lora`), a pair
            of one of these and a factor, or a list of them.
        params: those that they adapt.
        denoiser: the name of their component.

    Raises:
        ConfigError: something else.
        CheckpointError: files that are missing, damaged or another network's.
    """
    found, table = check(given), TABLES[denoiser]
    opened = [
        lora_files.load(item, params, table) if isinstance(item, str | os.PathLike) else item
        for item, _ in found
    ]
    return opened, [scale for _, scale in found]


def check(given):
    """`[(path or tree, factor), ...]`; raises as `open_adapters` does, before weights are read."""
    found = [pair(item) for item in (given if isinstance(given, list) else [given])]
    for item, _ in found:
        if isinstance(item, str | os.PathLike) and not os.path.exists(item):
            raise CheckpointError("there is no such LoRA file or directory", str(item))
    return found


def pair(item):
    """`(path or tree, factor)`."""
    item, scale = item if isinstance(item, tuple) and len(item) == 2 else (item, 1.0)
    number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    if not number or not np.isfinite(scale):
        raise ConfigError(f"expected a number as an adapter's factor, got {scale!r}", "lora")
    if not isinstance(item, str | os.PathLike | dict):
        what = f"expected the path of an adapter or its tree, got {type(item).__name__}"
        raise ConfigError(what, "lora", "or a pair of it and a factor, or a list of these")
    return item, float(scale)


def merged(params, adapters, scales):
    """`params` with the adapters in it; the kernels that they leave alone are shared.

    Sums are taken on the host, and results lie where the kernels lay: on a device, on the shards of
    a mesh or on the host.
    """
    flat = trees.flatten(params)
    targets = {path + lora.KERNEL for tree in adapters for path in lora.modules(tree)}
    own = {path: jax.device_get(flat[path]) for path in targets if path in flat}
    made = trees.flatten(lora.merge(trees.unflatten(own), adapters, scales)) if targets else {}
    for path, value in made.items():
        old, value = flat[path], np.asarray(value)
        flat[path] = sharding.put(value, old.sharding) if isinstance(old, jax.Array) else value
    return trees.unflatten(flat)

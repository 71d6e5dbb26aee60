"""int8 weights with one scale an output channel, made tensor by tensor while a file is read.

Weight-only: activations stay floating. A kernel's channel is divided by its largest magnitude / 127
and rounded, so no weight moves by more than 1/254 of the largest of its channel.
"""

import numpy as np

from cnxs_jax import tree
from cnxs_jax.convert import rules
from cnxs_jax.errors import ConfigError, did_you_mean

MODES = ("int8",)
LEVELS = 127


def quantize(kernel):
    """`(int8 [..., i, o], float32 [..., 1, o])` whose product is nearly the floating `kernel`."""
    kernel = np.asarray(kernel, np.float32)
    scale = np.abs(kernel).max(axis=-2, keepdims=True) / LEVELS
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    return np.rint(kernel / scale).astype(np.int8), scale


def quantized(module, mode):
    """`module` with int8 kernels.

    Raises ConfigError for an unknown mode, or a network that has no such form.
    """
    if mode not in MODES:
        hint = did_you_mean(mode, MODES)
        raise ConfigError(f"unknown quantization {mode!r}.{hint}", "quantize", f"one of {MODES}")
    if not hasattr(module, "quantization"):
        name = type(module).__name__
        raise ConfigError(f"{name} has no int8 form", "quantize", "T5 encoders have one")
    return module.clone(quantization=mode)


def to_params(tensors, target, quantized_target, table, where, dtype):
    """`rules.to_params` for the shapes of a quantised module: never a whole floating model.

    Args:
        target, quantized_target: shapes of the floating module, which the file fits, and of the
            quantised one, which says what becomes int8.
    """
    plan, shapes, problems = rules.fit(tensors, target, table, where)
    small = {
        path
        for path, leaf in tree.flatten(quantized_target).items()
        if leaf.dtype == np.int8 and path in shapes
    }
    rest = [entry for entry in plan if entry[0] not in small]
    others = {path: shape for path, shape in shapes.items() if path not in small}
    params = rules.fill(rest, others, problems, dtype)
    for path in small:
        shape = shapes[path]
        params[path] = np.empty(shape, np.int8)
        params[f"{path}_scale"] = np.empty((*shape[:-2], 1, shape[-1]), np.float32)
    for path, index, _, array in plan:
        if path in small:
            slot = ... if index is None else (index, ...)
            params[path][slot], params[f"{path}_scale"][slot] = quantize(
                rules.from_torch(path, array)
            )
    return tree.unflatten(params)

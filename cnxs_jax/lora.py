"""Low-rank adapters (LoRA, arXiv 2106.09685) as parameter trees, merged when they are applied.

An adapter tree mirrors the parameters: beside each target `a/b/kernel` it has `a/b/lora_A`,
`a/b/lora_B` and `a/b/scale`, and stands for

    kernel + scale * lora_A @ lora_B,     scale = alpha / rank

so any network, any objective and any mesh takes `merge(params, tree)` for its parameters. Training
moves the tree alone: `resolve = lambda params, frozen: merge(frozen["base"], params)`, for the
moving average, too.
"""

import jax
import jax.numpy as jnp

from cnxs_jax import tree as trees
from cnxs_jax.errors import ConfigError

KERNEL = "/kernel"

# What PixArt's own LoRA script adapts: every linear layer (and the patches' convolution).
PIXART_TARGETS = (
    r"(.*/)?(to_q|to_k|to_v|to_out_0|net_0/proj|net_2|proj|proj_out|linear|linear_1|linear_2)/kernel",
)
ATTENTION_TARGETS = (r".*/(to_q|to_k|to_v|to_out_0)/kernel",)


def init(params, targets, rank, key, alpha=None):
    """A fresh adapter tree that changes nothing: A uniform, B zero, as PEFT starts.

    Args:
        params: parameters, or their shapes.
        targets: patterns (`cnxs_jax.tree`) of kernels: linear [i, o], scanned linear [layers, i, o]
            or convolution [h, w, i, o]. What else they match is left out.
        rank: of each update.
        key: a random key.
        alpha: the update is multiplied by alpha / rank; alpha = rank unless given.

    Returns:
        A nested dict of float32 arrays. `scale` is no parameter: `merge` stops its gradient.

    Raises:
        ConfigError: a pattern that matches no kernel, a rank below 1, a kernel of another form.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    kernels = {p: v.shape for p, v in trees.flatten(params).items() if p.endswith(KERNEL)}
    trees.check_rules(patterns, kernels, "lora targets")
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"rank {rank!r}, expected a positive integer", "lora.init")
    chosen = {path: shape for path, shape in kernels.items() if trees.matches(patterns, path)}
    scale, adapters = (rank if alpha is None else alpha) / rank, {}
    for path, own in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        shape, layers = chosen[path], layers_of(path, chosen[path])
        fan_in = 1
        for size in shape[len(layers) : -1]:
            fan_in *= size
        limit = fan_in**-0.5  # PyTorch's kaiming_uniform with a = sqrt(5)
        adapters[path.removesuffix(KERNEL)] = {
            "lora_A": jax.random.uniform(own, (*shape[:-1], rank), minval=-limit, maxval=limit),
            "lora_B": jnp.zeros((*layers, rank, shape[-1])),
            "scale": jnp.full(layers, scale, jnp.float32),
        }
    return trees.unflatten(
        {f"{path}/{name}": leaf for path, parts in adapters.items() for name, leaf in parts.items()}
    )


def layers_of(path, shape):
    """The leading layer axis of a kernel, as a shape: (layers,) or ()."""
    if not 2 <= len(shape) <= 4:
        raise ConfigError(f"{path} has {len(shape)} axes; LoRA takes linear and convolution", path)
    return tuple(shape[:1]) if len(shape) == 3 else ()


def modules(tree):
    """{"a/b": {"lora_A", "lora_B", "scale"}} of an adapter tree. Raises ConfigError."""
    found = {}
    for path, leaf in trees.flatten(tree).items():
        parent, _, name = path.rpartition("/")
        found.setdefault(parent, {})[name] = leaf
    for path, parts in found.items():
        if set(parts) != {"lora_A", "lora_B", "scale"}:
            raise ConfigError(f"{path} has {sorted(parts)}", "adapter tree", "see lora.init")
    return found


def delta(adapter):
    """The update of one kernel, float32: scale * A @ B."""
    a, b = (adapter[name].astype(jnp.float32) for name in ("lora_A", "lora_B"))
    scale = jax.lax.stop_gradient(adapter["scale"].astype(jnp.float32))
    equation = "lir,lro->lio" if b.ndim == 3 else "...ir,ro->...io"
    scaled = b * scale.reshape(*scale.shape, 1, 1)
    return jnp.einsum(equation, a, scaled, precision=jax.lax.Precision.HIGHEST)


def merge(params, tree, scale=1.0):
    """`params` with the adapter's updates times `scale` added; other leaves are passed on.

    Args:
        params: parameters in their own dtype; the sum is taken in float32.
        tree: an adapter tree, or a list of them.
        scale: a factor (it may be traced), or a list of one an adapter.

    Raises:
        ConfigError: the tree has no place in `params`, or as many adapters as scales are missing.
    """
    several = isinstance(tree, list | tuple)
    adapters = list(tree) if several else [tree]
    scales = list(scale) if isinstance(scale, list | tuple) else [scale] * len(adapters)
    if len(scales) != len(adapters):
        raise ConfigError(f"{len(scales)} scales for {len(adapters)} adapters", "lora.merge")
    flat, updates = trees.flatten(params), {}
    for adapter, factor in zip(adapters, scales, strict=True):
        for path, parts in modules(adapter).items():
            check_fit(path, parts, flat)
            updates.setdefault(path + KERNEL, []).append(factor * delta(parts))
    for path, parts in updates.items():
        kernel = flat[path]
        flat[path] = (kernel.astype(jnp.float32) + sum(parts)).astype(kernel.dtype)
    return trees.unflatten(flat)


def unmerge(params, tree, scale=1.0):
    """Takes out what `merge` with the same arguments put in, up to rounding in their dtype."""
    if isinstance(scale, list | tuple):
        return merge(params, tree, [-s for s in scale])
    return merge(params, tree, -scale)


def check_fit(path, parts, flat):
    """Raises ConfigError unless the adapter's factors fit the kernel at `path`."""
    kernel = flat.get(path + KERNEL)
    if kernel is None:
        raise ConfigError(f"the parameters have no {path}{KERNEL}", "adapter tree")
    a, b = parts["lora_A"].shape, parts["lora_B"].shape
    layers = layers_of(path, kernel.shape)
    if a[:-1] != kernel.shape[:-1] or b != (*layers, a[-1], kernel.shape[-1]):
        raise ConfigError(f"factors {a} and {b} for a kernel {kernel.shape}", path)


def size(tree):
    """Number of trained parameters: the factors, without the scales."""
    return sum(p["lora_A"].size + p["lora_B"].size for p in modules(tree).values())

"""What the parity tests share: perturbed PyTorch weights, a mechanical mapping, relative error."""

import re

import jax.numpy as jnp
import numpy as np
import torch

from cnxs_jax import tree


def perturb(model, seed=0, scale=0.1):
    """Adds noise to every parameter, so that no norm, bias or zero-initialised layer is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def convert(tensors, scanned=(), rename=()):
    """PyTorch tensors {dotted name: tensor} -> parameter tree by the rules of architecture.md.

    Args:
        tensors: a state dict, or gradients under the same names.
        scanned: prefixes ("encoder.block") whose layers are stacked on a leading axis.
        rename: pairs (regex, replacement) applied to the dotted names first.
    """
    flat, stacks = {}, {}
    for name, tensor in tensors.items():
        for pattern, replacement in rename:
            name = re.sub(pattern, replacement, name)
        value = tensor.detach().numpy()
        *parents, leaf = name.split(".")
        if leaf == "weight":
            table = parents[-1] in ("shared", "embed_tokens", "relative_attention_bias")
            leaf = "embedding" if table else {1: "scale"}.get(value.ndim, "kernel")
            if leaf == "kernel":
                value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        name = ".".join([*parents, leaf])
        for prefix in scanned:
            found = re.fullmatch(re.escape(prefix) + r"\.(\d+)\.(.*)", name)
            if found:
                stacks.setdefault(f"{prefix}.{found[2]}", {})[int(found[1])] = value
                break
        else:
            flat[name] = value
    flat |= {k: np.stack([layers[i] for i in sorted(layers)]) for k, layers in stacks.items()}
    path = {re.sub(r"\.(\d+)(?=\.)", r"_\1", k).replace(".", "/"): v for k, v in flat.items()}
    return tree.unflatten({k: jnp.asarray(v) for k, v in path.items()})


def relative_error(ours, theirs):
    """max|a-b| / max|b| of two arrays."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def nhwc(tensor):
    """A PyTorch [B,C,H,W] tensor as an array [B,H,W,C]."""
    return tensor.detach().numpy().transpose(0, 2, 3, 1)

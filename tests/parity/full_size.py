"""What the slow tests of published sizes share: weights drawn in place, one network at a time.

A PyTorch module is made on the meta device, so that nothing is held twice, and every tensor is then
drawn: no norm, bias or zero-initialised convolution is trivial, and activations stay near one, as
in a trained network (noise of one size on every weight would saturate the attention).
"""

import contextlib
import gc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter

from cnxs_jax import tree
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import families, rules, unet
from tests.parity import xs_models

SIZE, BATCH, LENGTH = (32, 24), 2, 77  # latents, halved three times
XL_SIZE = (16, 16)
# What the channels of a resnet receive between its norms, of which the second has 32 groups.
BEFORE_NORM2 = r".*/resnets_\d+/(conv1/bias|time_emb_proj/.*)"
BASES = {"sd21_14m": "sd21", "sd15_53m": "sd15", "sdxl_20m": "sdxl", "sdxl_48m": "sdxl"}


def draw(model, seed=0):
    """Every parameter in its own dtype: kernels of gain one, norms and biases around theirs."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        value = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            value /= p[0].numel() ** 0.5
        else:
            value = float(name.endswith("weight")) + 0.1 * value
        p.data.copy_(value)
    return model.eval()


def on_meta(make, dtype=torch.float32, seed=0):
    """`make()` with drawn parameters; it never has its own."""
    with torch.device("meta"):
        model = make()
        for p in model.parameters():
            p.data = p.data.to(dtype)
    return draw(model.to_empty(device="cpu"), seed)


def fused(name, compat):
    """diffusers' controlled network of a published size, on the meta device."""
    base = UNet2DConditionModel(**unet.PUBLISHED[BASES[name]])
    return xs_models.fuse(base, ControlNetXSAdapter(**layouts.PUBLISHED[name]), compat)


def arrays(tensors):
    """{name: array} of tensors, without a copy, bfloat16 too."""
    return {
        key: value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if value.dtype == torch.bfloat16
        else value.detach().numpy()
        for key, value in tensors.items()
    }


def ours(cls, config, tensors, table=None):
    """(module, parameters) of a UNet or its adapter, tensor by tensor in the dtype of `tensors`."""
    family = families.family_of({"_class_name": cls}, "config")
    module, target = families.build(family, config, "config")
    plan = rules.fit(tensors, target, table)[0]  # these networks have no stacked layers
    flat = {path: jnp.array(rules.from_torch(path, array)) for path, _, _, array in plan}
    return module, tree.unflatten(flat)


@contextlib.contextmanager
def computed_in_float32(model):
    """Stored in bfloat16, computed in float32: a layer's parameters only while it runs."""

    def widen(layer, _):
        layer.stored = {key: p.data for key, p in layer.named_parameters(recurse=False)}
        for p in layer.parameters(recurse=False):
            p.data = p.data.float()

    def narrow(layer, *_):
        for key, p in layer.named_parameters(recurse=False):
            p.data = layer.stored[key]
        del layer.stored

    hooks = []
    for layer in model.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            hooks.append(layer.register_forward_pre_hook(widen))
            hooks.append(layer.register_forward_hook(narrow))
    yield
    for hook in hooks:
        hook.remove()


def inputs(name, size, batch=BATCH):
    """(x NHWC, t, cond, arguments of diffusers' networks) for a published UNet."""
    rng, config = np.random.default_rng(0), unet.PUBLISHED[name]

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    x, t = normal(batch, *size, 4), np.array([907, 31])[:batch]
    cond = {"text": normal(batch, LENGTH, config["cross_attention_dim"])}
    arguments = {
        "sample": torch.tensor(x).permute(0, 3, 1, 2),
        "timestep": torch.tensor(t),
        "encoder_hidden_states": torch.tensor(cond["text"]),
    }
    if "addition_embed_type" in config:
        ids = rng.integers(0, 1024, (batch, 6)).astype(np.float32)
        cond |= {"pooled": normal(batch, 1280), "time_ids": ids}
        added = {"text_embeds": cond["pooled"], "time_ids": ids}
        arguments["added_cond_kwargs"] = {k: torch.tensor(v) for k, v in added.items()}
    return x, t, cond, arguments


def controlled_inputs(name, size, scale):
    """The same with a hint and a control scale, for a published controller."""
    x, t, cond, arguments = inputs(BASES[name], size)
    hint = np.random.default_rng(1).uniform(size=(len(x), 8 * size[0], 8 * size[1], 3))
    cond |= {"hint": hint.astype(np.float32), "control_scale": np.full(len(x), scale, np.float32)}
    arguments["controlnet_cond"] = torch.tensor(cond["hint"]).permute(0, 3, 1, 2)
    return x, t, cond, arguments | {"conditioning_scale": scale}


def gradient_errors(ours, theirs):
    """({figure: value}, name of the worst tensor) of gradients {path: array}.

    `gradient_error` is the worst max|a-b| / max|b| of all tensors but those before a norm with one
    channel a group: it subtracts what they add, so that their gradients are zero but for rounding
    (1e-17 in float64). `zero_gradient` is the most that either side has there, by the largest
    gradient of all.
    """
    assert ours.keys() == theirs.keys()
    most = {key: np.abs(b).max() for key, b in theirs.items()}
    zero = {k for k, b in theirs.items() if tree.matches(BEFORE_NORM2, k) and b.shape[-1] <= 32}
    found = max([np.abs(x[key]).max() for x in (ours, theirs) for key in zero], default=0.0)
    errors = {key: np.abs(ours[key] - theirs[key]).max() / most[key] for key in most.keys() - zero}
    worst = max(errors, key=errors.get)
    figures = {"gradient_error": float(errors[worst])}
    if zero:
        figures["zero_gradient"] = float(found / max(most.values()))
    return figures, worst


def free():
    """Gives back what was deleted, before the next network is made."""
    gc.collect()

"""Tiny ControlNet-XS of diffusers, perturbed, and inputs for both sides."""

import diffusers
import numpy as np
import torch
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter, UNetControlNetXSModel

from tests.parity.helpers import perturb

TEXT = 12
BASE = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    norm_num_groups=4,
    cross_attention_dim=TEXT,
    attention_head_dim=2,
)
XL = BASE | dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=10 + 6 * 6,
)
# Channels and groups of which every rule of the implementations makes something else.
ADAPTER = dict(
    block_out_channels=(6, 24),
    base_block_out_channels=(8, 16),
    num_attention_heads=(2, 3),
    conditioning_embedding_out_channels=(4, 6),
    cross_attention_dim=TEXT,
    max_norm_num_groups=5,
    sample_size=8,
)
CASES = {
    "sd": (BASE, dict(use_linear_projection=False, learn_time_embedding=False)),
    "sdxl": (XL, dict(learn_time_embedding=True, time_embedding_mix=0.7)),
}
SHARED = ("down_block_types", "transformer_layers_per_block")


def make(name):
    """(base, adapter): PyTorch models with noise on every parameter."""
    base, changes = CASES[name]
    torch.manual_seed(0)
    shared = {key: base[key] for key in SHARED if key in base}
    adapter = ControlNetXSAdapter(**{**ADAPTER, **shared, **changes})
    return perturb(diffusers.UNet2DConditionModel(**base)), perturb(adapter, seed=1)


def fuse(base, adapter, compat):
    """The fused model of diffusers as `compat` names it; official: its norms corrected."""
    fused = UNetControlNetXSModel.from_unet(base, adapter)
    if compat == "diffusers":
        return fused.eval()
    loaded = UNetControlNetXSModel.from_config(fused.config)
    loaded.load_state_dict(fused.state_dict())
    if compat == "official":
        correct_norms(loaded, adapter.config.max_norm_num_groups)
    return loaded.eval()


def correct_norms(fused, most):
    """What the original network has: epsilons and groups by facts, module by module.

    All resnets 1e-5. The controller's norms: the largest divisor of the channels up to `most`; its
    transformers 1e-5 beside SDXL, else 1e-6.
    """
    xl = fused.config.addition_embed_type is not None
    for name, module in fused.named_modules():
        if not isinstance(module, torch.nn.GroupNorm):
            continue
        if "resnets" in name:
            module.eps = 1e-5
        if "ctrl" in name:
            channels = module.num_channels
            module.num_groups = max(n for n in range(1, most + 1) if channels % n == 0)
            if "attentions" in name:
                module.eps = 1e-5 if xl else 1e-6


def inputs(name, size=(8, 8), seed=0, factor=2):
    """(x NHWC, t, cond, the fused model's arguments)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    hint = rng.uniform(size=(2, factor * size[0], factor * size[1], 3)).astype(np.float32)
    x, t, cond = normal(2, *size, 4), np.array([3, 907]), {"text": normal(2, 5, TEXT), "hint": hint}
    arguments = {
        "sample": torch.tensor(x).permute(0, 3, 1, 2),
        "timestep": torch.tensor(t),
        "encoder_hidden_states": torch.tensor(cond["text"]),
        "controlnet_cond": torch.tensor(hint).permute(0, 3, 1, 2),
    }
    if name == "sdxl":
        cond |= {"pooled": normal(2, 10), "time_ids": rng.integers(0, 99, (2, 6)).astype("f4")}
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        arguments["added_cond_kwargs"] = {k: torch.tensor(v) for k, v in added.items()}
    return x, t, cond, arguments

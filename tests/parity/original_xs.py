"""The original ControlNet-XS network, run from a checkout of vislearn/ControlNet-XS.

The environment variable CNXS_ORIGINAL_XS names the checkout. What its modules import at their head
and do not need here (a depth estimator, configuration files) is replaced by empty modules.
"""

import importlib
import os
import pathlib
import sys
import types

import torch

PATH = os.environ.get("CNXS_ORIGINAL_XS", "")
TEXT = 12
SIZES = dict(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    use_spatial_transformer=True,
    context_dim=TEXT,
    legacy=False,
)
LDM = SIZES | dict(image_size=8, attention_resolutions=(1,), num_heads=2)
SGM = SIZES | dict(
    attention_resolutions=(2,),
    num_head_channels=16,
    use_linear_in_transformer=True,
    transformer_depth=[1, 2],
    num_classes="sequential",
    adm_in_channels=10 + 6 * 6,
)
# The published controllers, of which only names and shapes are made.
SD = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    attention_resolutions=(4, 2, 1),
    use_spatial_transformer=True,
    legacy=False,
)
XL = SGM | dict(
    model_channels=320,
    channel_mult=(1, 2, 4),
    num_res_blocks=2,
    attention_resolutions=(4, 2),
    num_head_channels=64,
    transformer_depth=[1, 2, 10],
    context_dim=2048,
    adm_in_channels=2816,
)
SD21_BASE = dict(num_head_channels=64)
SD21 = dict(num_head_channels=8, use_linear_in_transformer=True, context_dim=1024)
PUBLISHED = {
    "sd21_14m": ("ldm", SD | SD21, 0.0125, True),
    "sd15_53m": ("ldm", SD | dict(num_heads=8, context_dim=768), 0.2, False),
    "sdxl_20m": ("sgm", XL, 0.05, False),
    "sdxl_48m": ("sgm", XL, 0.1, True),
}


def load(package):
    """(two-stream module, base module) of "ldm" (Stable Diffusion) or "sgm" (SDXL)."""
    stub("omegaconf", ListConfig=list)
    stub("omegaconf.listconfig", ListConfig=list)
    stub("torchvision", transforms=types.ModuleType("torchvision.transforms"))
    stub("annotator")
    stub("annotator.midas", MidasDetector=object)
    for name in (package, f"{package}.modules", f"{package}.modules.diffusionmodules"):
        stub(name, __path__=[str(pathlib.Path(PATH, *name.split(".")))])
    inside = f"{package}.modules.diffusionmodules"
    names = "twoStreamControl", "openaimodel"
    return tuple(importlib.import_module(f"{inside}.{name}") for name in names)


def stub(name, **attributes):
    """A module with these attributes where there is none."""
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)


def make(
    package,
    ratio=0.25,
    learn=False,
    guiding="encoder_double",
    infusion="cat",
    sizes=None,
    base=None,
):
    """(controller, base) with the module's own initialisation.

    Args:
        sizes: the module's arguments; those of Stable Diffusion's base may differ by `base`.
    """
    two_stream, unets = load(package)
    sizes = sizes or (LDM if package == "ldm" else SGM)
    kind = dict(
        hint_channels=3,
        guiding=guiding,
        infusion2control=infusion,
        control_model_ratio=ratio,
        learn_embedding=learn,
        fixed=True,
    )
    net = two_stream.TwoStreamControlNet(**sizes, **kind)
    if package == "sgm":
        return net, net.diffusion_model
    return net, unets.UNetModel(**sizes | (base or {}))


def published(name):
    """{name: shape} of a published controller's file, without its base."""
    package, sizes, ratio, learn = PUBLISHED[name]
    with torch.device("meta"):
        net, _ = make(package, ratio, learn, sizes=sizes)
    tensors = net.state_dict()
    return {k: tuple(v.shape) for k, v in tensors.items() if not k.startswith("diffusion_model.")}

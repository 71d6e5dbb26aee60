"""PixArt and its controller against the original code, and against diffusers' research project.

  CNXS_ORIGINAL_PIXART=CHECKOUT     of PixArt-alpha/PixArt-alpha
  CNXS_DIFFUSERS_PIXART=FILE        examples/research_projects/pixart/controlnet_pixart_alpha.py
  pytest tests/parity/test_pixart_original.py

Runs only what is named. `test_dit` and `test_controlnet_transformer` state the same arithmetic with
diffusers' blocks. What the original's modules import at their head is not needed but for timm's MLP
and attention, whose few lines are here, and xformers' attention, which needs a GPU.
"""

import importlib
import importlib.util
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

import cnxs_jax
from cnxs_jax import control
from cnxs_jax.control.controlnet_transformer import ControlNetTransformer
from cnxs_jax.convert import families
from cnxs_jax.models.dit import PixArt
from tests.parity.helpers import convert, nhwc, perturb, relative_error
from tests.parity.original_xs import stub

CHECKOUT = os.environ.get("CNXS_ORIGINAL_PIXART", "")
FILE = os.environ.get("CNXS_DIFFUSERS_PIXART", "")
pytestmark = pytest.mark.parity
LENGTH, TEXT = 7, 20
DEPTH = 14


class Attention(torch.nn.Module):
    """The layers of timm's; the forward pass is the original's."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, **_):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = torch.nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = torch.nn.Linear(dim, dim)
        self.attn_drop = self.proj_drop = torch.nn.Dropout(0.0)


class Mlp(torch.nn.Module):
    """timm's, without dropout."""

    def __init__(self, in_features, hidden_features=None, out_features=None, act_layer=None, **_):
        super().__init__()
        hidden = hidden_features or in_features
        self.fc1 = torch.nn.Linear(in_features, hidden)
        self.act = act_layer()
        self.fc2 = torch.nn.Linear(hidden, out_features or in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(torch.nn.Module):
    """timm's: a convolution, then a list of tokens."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.patch_size = (patch_size, patch_size)
        self.proj = torch.nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Blocks:
    """xformers' block-diagonal bias: each picture attends to its own text."""

    def __init__(self, queries, keys):
        self.queries, self.keys = queries, keys

    @classmethod
    def from_seqlens(cls, queries, keys):
        return cls(queries, keys)


def attend(q, k, v, p=0.0, attn_bias=None):
    """xformers' attention [B,L,h,d], the softmax written out."""
    if attn_bias is not None:
        parts = zip(
            q.split(attn_bias.queries, 1), k.split(attn_bias.keys, 1), v.split(attn_bias.keys, 1),
            strict=True,
        )  # fmt: skip
        return torch.cat([attend(*part) for part in parts], dim=1)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).contiguous()


class Registry:
    """mmcv's, of which only the decorator is used."""

    def __init__(self, name):
        self.register_module = lambda: lambda cls: cls


@pytest.fixture(scope="module")
def original():
    """The original's `nets` package."""
    if not CHECKOUT:
        pytest.skip("CNXS_ORIGINAL_PIXART names no checkout")
    stub("timm")
    stub("timm.models")
    stub("timm.models.layers", DropPath=torch.nn.Identity)
    stub("timm.models.vision_transformer", Mlp=Mlp, Attention=Attention, PatchEmbed=PatchEmbed)
    operations = {"memory_efficient_attention": attend}
    stub("xformers.ops", **operations, fmha=type("fmha", (), {"BlockDiagonalMask": Blocks}))
    stub("xformers", ops=sys.modules["xformers.ops"])
    stub("mmcv", Registry=Registry)
    stub("torchvision", transforms=None)
    for name in ("diffusion", "diffusion.model"):
        stub(name, __path__=[str(pathlib.Path(CHECKOUT, *name.split(".")))])
    stub("diffusion.utils")
    stub("diffusion.utils.logger", get_root_logger=None)
    return importlib.import_module("diffusion.model.nets")


CONFIG = {
    "num_layers": DEPTH, "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
    "out_channels": 8, "patch_size": 2, "sample_size": 16, "cross_attention_dim": 24,
    "caption_channels": TEXT,
}  # fmt: skip


def inputs(size):
    rng = np.random.default_rng(0)
    x, hint = (rng.normal(size=(2, *size, 4)).astype(np.float32) for _ in range(2))
    text = rng.normal(size=(2, LENGTH, TEXT)).astype(np.float32)
    mask = (np.arange(LENGTH)[None] < np.array([[3], [7]])).astype(np.int32)
    return x, hint, np.array([17, 803]), text, mask


def ours(module, params, x, t, cond):
    cond = jax.tree.map(jnp.asarray, cond)
    with jax.default_matmul_precision("highest"):
        return jax.jit(module.apply)({"params": params}, x, t, cond)


def nchw(array):
    return torch.tensor(array).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("multi_scale", "num"), [(True, 0), (True, 1), (True, 3), (True, 13), (False, 0), (False, 3)]
)
def test_the_original(original, multi_scale, num, tmp_path):
    """Its own file is read here; base (0 copies) and controlled network give the same."""
    size = (12, 20) if multi_scale else (16, 16)
    kind = original.PixArtMS if multi_scale else original.PixArt
    base = kind(
        input_size=16, hidden_size=24, depth=DEPTH, num_heads=2, caption_channels=TEXT,
        model_max_length=LENGTH,
    )  # fmt: skip
    perturb(base)
    model = base
    if num:
        half = original.ControlPixArtMSHalf if multi_scale else original.ControlPixArtHalf
        model = perturb(half(base, num), seed=1)
    x, hint, t, text, mask = inputs(size)
    shape = np.array([[96, 160], [64, 64]], np.float32), np.array([[0.6], [1]], np.float32)
    given = {
        "data_info": {"img_hw": torch.tensor(shape[0]), "aspect_ratio": torch.tensor(shape[1])}
    }
    if num:
        given["c"] = nchw(hint)
    texts = torch.tensor(text)[:, None], torch.tensor(mask)[:, None, None]
    with torch.no_grad():
        expected = nhwc(model(nchw(x), torch.tensor(t), *texts, **given))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "net.pth")
    config = CONFIG | {"_class_name": "PixArtTransformer2DModel"}
    config |= {"use_additional_conditions": multi_scale}
    name = ("transformer",) if num else ()
    module, params = cnxs_jax.load_model(tmp_path / "net.pth", *name, config=config)
    cond = {"text": text, "text_mask": mask}
    if multi_scale:
        cond |= {"size": shape[0], "aspect": shape[1]}
    if num:
        config = families.config_of(ControlNetTransformer(num, 2, 12, "released"))
        adapter = cnxs_jax.load_model(tmp_path / "net.pth", "controlnet", config=config)
        module, params = control.attach(module, params, *adapter)
        cond |= {"hint": hint, "control_scale": np.ones(2, np.float32)}
    error = relative_error(ours(module, params, x, t, cond), expected)
    print(f"{error:.1e}")
    assert error <= 1e-5


@pytest.mark.skipif(not FILE, reason="CNXS_DIFFUSERS_PIXART names no file")
@pytest.mark.parametrize("num", [1, 3])
def test_diffusers_research_project(num, tmp_path):
    """Its adapter has PixArt-XL/2's width built in; the base has four such blocks here."""
    spec = importlib.util.spec_from_file_location("controlnet_pixart_alpha", FILE)
    project = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(project)
    wide = {"num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152}
    config = CONFIG | wide | {"num_layers": 4, "use_additional_conditions": False}
    base = perturb(PixArtTransformer2DModel(**config), scale=0.02)
    adapter = project.PixArtControlNetAdapterModel(num_layers=num)
    perturb_all(adapter, seed=1, scale=0.02)
    both = project.PixArtControlNetTransformerModel(base, adapter, blocks_num=num)
    x, hint, t, text, mask = inputs((12, 20))
    with torch.no_grad():
        expected = nhwc(
            both(
                nchw(x), torch.tensor(text), torch.tensor(t), nchw(hint),
                encoder_attention_mask=torch.tensor(mask),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        )  # fmt: skip
    adapter.save_pretrained(tmp_path)
    params = convert(base.state_dict(), scanned=("transformer_blocks",))
    module, params = control.attach(PixArt(**config), params, *cnxs_jax.load_model(tmp_path))
    cond = {"text": text, "text_mask": mask, "hint": hint, "control_scale": np.ones(2, "f4")}
    error = relative_error(ours(module, params, x, t, cond), expected)
    print(f"{error:.1e}")
    assert error <= 1e-5


def perturb_all(model, seed, scale):
    """As `perturb`, for a model whose `train` and `eval` return nothing."""
    model.eval = lambda: model
    perturb(model, seed, scale)
    del model.eval

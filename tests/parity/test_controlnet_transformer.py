"""ControlNet-Transformer against the block order of PixArt-delta's code, written out in PyTorch.

Embedders, blocks and the final layer are diffusers'; what happens between the blocks is here.
"""

import copy
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

from cnxs_jax import control
from cnxs_jax.control.controlnet_transformer import ControlNetTransformer
from cnxs_jax.convert import families
from cnxs_jax.models.dit import PixArt
from cnxs_jax.pipelines import load
from tests import checks
from tests.parity.helpers import convert, nhwc, perturb, relative_error

pytestmark = pytest.mark.parity

TINY = {
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 16,
    "cross_attention_dim": 24,
    "caption_channels": 20,
    "use_additional_conditions": True,
}
DEEP = TINY | {"num_layers": 28}
XL_512 = {"sample_size": 64, "caption_channels": 4096}  # PixArt-XL/2 at 512 px
SIZE, BATCH, LENGTH = (12, 20), 2, 7


class Control(torch.nn.Module):
    """Copies of the first blocks, a linear before the first and one after each."""

    def __init__(self, base, num):
        super().__init__()
        width = base.inner_dim
        self.before_proj = torch.nn.Linear(width, width)
        self.copies = torch.nn.ModuleList(
            copy.deepcopy(base.transformer_blocks[i]) for i in range(num)
        )
        self.after = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(num))

    def tensors(self):
        """State dict under the names of diffusers' adapter; the first linear on its own."""
        found = {}
        for i, (block, after) in enumerate(zip(self.copies, self.after, strict=True)):
            name = f"controlnet_blocks.{i}"
            found |= {f"{name}.transformer_block.{k}": v for k, v in block.state_dict().items()}
            found |= {f"{name}.after_proj.{k}": v for k, v in after.state_dict().items()}
        own = self.before_proj.state_dict()
        return found | {f"before_proj.{k}": v for k, v in own.items()}


def released(blocks, net, h, hint, run, scale):
    """x = B0(x); c = C0(x + before(c)); x = B1(x + after0(c)); c = C1(c); ..."""
    h, c = run(blocks[0], h), hint
    for i in range(1, len(blocks)):
        if i <= len(net.copies):
            c = net.before_proj(c) + h if i == 1 else c
            c = run(net.copies[i - 1], c)
            h = h + scale * net.after[i - 1](c)
        h = run(blocks[i], h)
    return h


def paper(blocks, net, h, hint, run, scale):
    """Copy and block run side by side from the same input; figure 4 (c)."""
    c = h + net.before_proj(hint)
    for i, block in enumerate(blocks):
        h = run(block, h)
        if i < len(net.copies):
            c = run(net.copies[i], c)
            h = h + scale * net.after[i](c)
    return h


def unet(blocks, net, h, hint, run, scale):
    """The copies are an encoder, their outputs skip to the mirrored blocks; figure 4 (b)."""
    c, skips = h + net.before_proj(hint), []
    for block, after in zip(net.copies, net.after, strict=True):
        c = run(block, c)
        skips.append(scale * after(c))
    for i, block in enumerate(blocks):
        left = len(blocks) - i
        h = run(block, h + skips.pop() if left == len(skips) else h)
    assert not skips
    return h


FLOWS = {"released": released, "paper": paper, "unet": unet}


def theirs(model, net, inputs, flow):
    """The controlled network, [B,8,H,W]."""
    x, hint, t, text, mask, size, aspect, scale = (torch.tensor(v) for v in inputs)
    batch, height, width = len(x), x.shape[1] // 2, x.shape[2] // 2
    x, hint = x.permute(0, 3, 1, 2), hint.permute(0, 3, 1, 2)
    extra = {"resolution": size, "aspect_ratio": aspect}
    modulation, emb = model.adaln_single(t, extra, batch_size=batch, hidden_dtype=x.dtype)
    context = model.caption_projection(text)
    bias = (1 - mask.to(x.dtype))[:, None] * -10000.0

    def run(block, h):
        return block(
            h, encoder_hidden_states=context, encoder_attention_mask=bias, timestep=modulation
        )

    h, c = model.pos_embed(x), model.pos_embed(hint)
    h = flow(model.transformer_blocks, net, h, c, run, scale[:, None, None])
    shift, weight = (model.scale_shift_table[None] + emb[:, None]).chunk(2, dim=1)
    h = model.proj_out(model.norm_out(h) * (1 + weight) + shift)
    h = h.reshape(batch, height, width, 2, 2, 8).permute(0, 5, 1, 3, 2, 4)
    return h.reshape(batch, 8, 2 * height, 2 * width)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x, hint = (rng.normal(size=(BATCH, *SIZE, 4)).astype(np.float32) for _ in range(2))
    text = rng.normal(size=(BATCH, LENGTH, 20)).astype(np.float32)
    mask = (np.arange(LENGTH)[None] < np.array([[3], [7]])).astype(np.int32)
    size, aspect = np.array([[96, 160], [64, 64]], np.float32), np.array([[0.6], [1]], np.float32)
    return x, hint, np.array([17, 803]), text, mask, size, aspect, np.array([1, 0.7], np.float32)


def compare(inputs, config, order, num, moved=0.1):
    """Relative error of the controlled network of this size, every parameter perturbed."""
    model = perturb(PixArtTransformer2DModel(**config), scale=moved)
    net = perturb(Control(model, num), seed=1, scale=moved)
    with torch.no_grad():
        expected = nhwc(theirs(model, net, inputs, FLOWS[order]))
    base_params = convert(model.state_dict(), scanned=("transformer_blocks",))
    own = convert(net.tensors(), scanned=("controlnet_blocks",))
    del model, net
    gc.collect()
    base = PixArt(**config)
    adapter = ControlNetTransformer(num, base.num_attention_heads, base.attention_head_dim, order)
    module, params = control.attach(base, base_params, adapter, own)
    x, hint, t, text, mask, size, aspect, scale = (jnp.asarray(v) for v in inputs)
    cond = {"text": text, "text_mask": mask, "size": size, "aspect": aspect}
    cond |= {"hint": hint, "control_scale": scale}
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(module.apply)({"params": params}, x, t, cond)
    error = relative_error(ours, expected)
    print(f"{order}, N = {num}: {error:.2e}")
    return error


@pytest.mark.parametrize(
    ("order", "num"),
    [("released", 1), ("released", 3), ("paper", 1), ("paper", 3), ("unet", 1), ("unet", 2)],
)
def test_block_order(inputs, order, num):
    assert compare(inputs, TINY, order, num) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("order", "num"), [("released", 13), ("paper", 13), ("unet", 14)])
def test_block_order_at_the_published_depth(inputs, order, num):
    error = compare(inputs, DEEP, order, num)
    checks.record(f"ControlNet-Transformer of 28 blocks, {order}, N = {num}", relative_error=error)
    assert error <= 1e-5


@pytest.mark.slow
def test_xl_2_at_512_px_with_13_copied_blocks():
    """The published size; some minutes and about 12 GB."""
    rng = np.random.default_rng(0)
    x, hint = (rng.normal(size=(1, 64, 64, 4)).astype(np.float32) for _ in range(2))
    text = rng.normal(size=(1, 120, 4096)).astype(np.float32)
    mask = (np.arange(120)[None] < 37).astype(np.int32)
    size, one = np.full((1, 2), 512, np.float32), np.ones(1, np.float32)
    given = x, hint, np.array([503]), text, mask, size, one[None], one
    error = compare(given, XL_512, "released", 13, moved=0.02)
    checks.record("PixArt-XL/2 512 px with 13 copied blocks", relative_error=error)
    assert error <= 1e-5


def test_official_pth(tmp_path):
    """The `.pth` with both networks is a plain `torch.save`; copies of blocks are under theirs."""
    model = perturb(PixArtTransformer2DModel(**TINY))
    net = perturb(Control(model, 2), seed=1)
    base_params = convert(model.state_dict(), scanned=("transformer_blocks",))
    own = convert(net.tensors(), scanned=("controlnet_blocks",))
    adapter = ControlNetTransformer(2, 2, 12)
    module, params = control.attach(PixArt(**TINY), base_params, adapter, own)
    file = tmp_path / "control.pth"
    load.save_official(module, params, file)
    state = torch.load(file, weights_only=True)["state_dict"]
    block = net.copies[1]
    qkv = torch.cat(
        [layer.weight for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)]
    )
    torch.testing.assert_close(state["controlnet.1.copied_block.attn.qkv.weight"], qkv.detach())
    torch.testing.assert_close(
        state["controlnet.0.before_proj.weight"], net.before_proj.weight.detach()
    )
    torch.testing.assert_close(
        state["base_model.blocks.3.mlp.fc1.bias"],
        model.transformer_blocks[3].ff.net[0].proj.bias.detach(),
    )
    config = families.config_of(module.control)
    back = load.load_model(file, "controlnet", config=config)[1]
    jax.tree.map(np.testing.assert_array_equal, back, own)

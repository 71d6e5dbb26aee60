"""ControlNet-Transformer against the block order of PixArt-delta's code, written out in PyTorch.

Embedders, blocks and the final layer are diffusers'; what happens between the blocks is here.
"""

import copy

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
SIZE, BATCH, LENGTH, WIDTH = (12, 20), 2, 7, 24


class Control(torch.nn.Module):
    """Copies of the first blocks, a linear before the first and one after each."""

    def __init__(self, base, num):
        super().__init__()
        self.before_proj = torch.nn.Linear(WIDTH, WIDTH)
        self.copies = torch.nn.ModuleList(
            copy.deepcopy(base.transformer_blocks[i]) for i in range(num)
        )
        self.after = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(num))

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
    x, hint = x.permute(0, 3, 1, 2), hint.permute(0, 3, 1, 2)
    extra = {"resolution": size, "aspect_ratio": aspect}
    modulation, emb = model.adaln_single(t, extra, batch_size=BATCH, hidden_dtype=x.dtype)
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
    height, width = SIZE[0] // 2, SIZE[1] // 2
    h = h.reshape(BATCH, height, width, 2, 2, 8).permute(0, 5, 1, 3, 2, 4)
    return h.reshape(BATCH, 8, *SIZE)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x, hint = (rng.normal(size=(BATCH, *SIZE, 4)).astype(np.float32) for _ in range(2))
    text = rng.normal(size=(BATCH, LENGTH, 20)).astype(np.float32)
    mask = (np.arange(LENGTH)[None] < np.array([[3], [7]])).astype(np.int32)
    size, aspect = np.array([[96, 160], [64, 64]], np.float32), np.array([[0.6], [1]], np.float32)
    return x, hint, np.array([17, 803]), text, mask, size, aspect, np.array([1, 0.7], np.float32)


@pytest.mark.parametrize(
    ("order", "num"),
    [("released", 1), ("released", 3), ("paper", 1), ("paper", 3), ("unet", 1), ("unet", 2)],
)
def test_block_order(inputs, order, num):
    model = perturb(PixArtTransformer2DModel(**TINY))
    net = perturb(Control(model, num), seed=1)
    with torch.no_grad():
        expected = nhwc(theirs(model, net, inputs, FLOWS[order]))
    base_params = convert(model.state_dict(), scanned=("transformer_blocks",))
    own = convert(net.tensors(), scanned=("controlnet_blocks",))
    adapter = ControlNetTransformer(num, 2, 12, order)
    module, params = control.attach(PixArt(**TINY), base_params, adapter, own)
    x, hint, t, text, mask, size, aspect, scale = (jnp.asarray(v) for v in inputs)
    cond = {"text": text, "text_mask": mask, "size": size, "aspect": aspect}
    cond |= {"hint": hint, "control_scale": scale}
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(module.apply)({"params": params}, x, t, cond)
    error = relative_error(ours, expected)
    print(f"{order}, N = {num}: {error:.2e}")
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

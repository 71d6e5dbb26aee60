"""The DiT against diffusers' PixArtTransformer2DModel, float32, every parameter perturbed."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

from cnxs_jax.models.dit import PixArt
from tests import checks
from tests.parity.helpers import convert, nhwc, perturb, relative_error

pytestmark = pytest.mark.parity

TINY = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 16,
    "cross_attention_dim": 24,
    "caption_channels": 20,
}
XL_512 = {"sample_size": 64, "caption_channels": 4096}


def compare(config, size, length, batch, seed=0, scale=0.1):
    theirs = perturb(PixArtTransformer2DModel(**config), seed, scale)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, *size, config.get("in_channels", 4))).astype(np.float32)
    t = rng.integers(0, 1000, batch)
    text = rng.normal(size=(batch, length, config["caption_channels"])).astype(np.float32)
    mask = (np.arange(length)[None] < rng.integers(1, length + 1, (batch, 1))).astype(np.int32)
    extra = {
        "size": np.tile(np.array(size, np.float32) * 8, (batch, 1)),
        "aspect": np.full((batch, 1), size[0] / size[1], np.float32),
    }
    with torch.no_grad():
        expected = theirs(
            torch.tensor(x).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.tensor(text),
            timestep=torch.tensor(t),
            added_cond_kwargs={
                "resolution": torch.tensor(extra["size"]),
                "aspect_ratio": torch.tensor(extra["aspect"]),
            },
            encoder_attention_mask=torch.tensor(mask),
        ).sample
    expected = nhwc(expected)
    params = convert(theirs.state_dict(), scanned=("transformer_blocks",))
    del theirs
    gc.collect()
    cond = {"text": text, "text_mask": mask, **extra}
    with jax.default_matmul_precision("highest"):
        module = PixArt(**config)
        ours = jax.jit(lambda p: module.apply({"params": p}, jnp.asarray(x), t, cond))(params)
    return relative_error(ours, expected)


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (20, 8)])
def test_tiny(size, micro):
    assert compare(TINY | {"use_additional_conditions": micro}, size, 7, 3) <= 1e-5


def test_interpolation_scale():
    config = TINY | {"use_additional_conditions": False, "interpolation_scale": 2}
    assert compare(config, (16, 16), 7, 2) <= 1e-5


@pytest.mark.slow
def test_xl_2_at_512_px():
    """The published size; about two minutes and 8 GB."""
    error = compare(XL_512, (64, 64), 120, 1, scale=0.02)
    checks.record("PixArt-XL/2 512 px against diffusers", relative_error=error)
    assert error <= 1e-5

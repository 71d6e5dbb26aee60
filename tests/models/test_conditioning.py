"""Three encoders as one condition, and CLIP's view of a picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnxs_jax.errors import ConfigError
from cnxs_jax.models import conditioning
from cnxs_jax.models.clip import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from cnxs_jax.models.conditioning import Encoders, clip_pixels
from cnxs_jax.models.pixel_unet import PixelUNet
from cnxs_jax.models.t5 import T5Encoder
from tests.pipelines.tiny import perturbed

CLIP = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
T5 = T5Encoder(vocab_size=40, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
TEXT = CLIPTextModelWithProjection(
    vocab_size=40, projection_dim=6, max_position_embeddings=5, eos_token_id=1, **CLIP
)
IMAGE = CLIPVisionModelWithProjection(image_size=8, patch_size=4, projection_dim=7, **CLIP)
ENCODERS = Encoders(T5, TEXT, IMAGE)
IDS = np.array([[5, 6, 1, 0, 0], [7, 8, 9, 3, 1]])
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
INPUTS = {
    "input_ids": IDS,
    "attention_mask": MASK,
    "clip_input_ids": IDS,
    "clip_attention_mask": MASK,
    "clip_pixels": np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32),
}


@pytest.fixture(scope="module")
def params():
    return {
        "text": perturbed(T5, IDS, MASK),
        "clip_text": perturbed(TEXT, IDS),
        "clip_image": perturbed(IMAGE, INPUTS["clip_pixels"]),
    }


@pytest.fixture(scope="module")
def cond(params):
    return jax.jit(ENCODERS)(params, INPUTS)


def test_the_keys_and_widths_are_those_that_the_network_reads(cond):
    shapes = {k: v.shape for k, v in cond.items()}
    assert shapes == {
        "text": (2, 5, 12), "text_mask": (2, 5), "clip_text": (2, 5, 8), "clip_text_mask": (2, 5),
        "pooled": (2, 6), "clip_image": (2, 7), "clip_image_mask": (2,),
    }  # fmt: skip
    unet = PixelUNet(
        block_out_channels=(8,), layers_per_block=(1,), self_attention=(False,),
        cross_attention=(True,), attention_head_dim=8, cross_attention_dim=8, norm_num_groups=4,
        **ENCODERS.widths(),
    )  # fmt: skip
    ENCODERS.check(unet)
    x = jnp.zeros((2, 4, 4, 3))
    jax.eval_shape(unet.init, jax.random.key(0), x, jnp.zeros(2), cond)
    with pytest.raises(ConfigError, match="pooled_dim 9, but the encoder gives 6"):
        ENCODERS.check(unet.clone(pooled_dim=9), "base")


def test_padding_of_clip_reaches_no_real_token(params, cond):
    other = {**INPUTS, "clip_input_ids": np.where(MASK > 0, IDS, 11)}
    got = jax.jit(ENCODERS)(params, other)
    np.testing.assert_allclose(got["clip_text"][0, :3], cond["clip_text"][0, :3], atol=1e-6)
    np.testing.assert_allclose(got["pooled"], cond["pooled"], atol=1e-6)
    assert np.abs(got["clip_text"][0, 3:] - cond["clip_text"][0, 3:]).max() > 1e-3


def test_what_is_missing_is_left_out(params):
    without = {k: v for k, v in INPUTS.items() if k != "clip_pixels"}
    cond = jax.eval_shape(ENCODERS, params, without)
    assert not [k for k in cond if k.startswith("clip_image")]
    only = jax.eval_shape(Encoders(text=T5), params, INPUTS)
    assert sorted(only) == ["text", "text_mask"]
    dropped = conditioning.dropped({k: jnp.ones(v.shape) for k, v in cond.items()})
    assert sorted(dropped) == ["clip_text_mask", "text_mask"]
    assert not any(np.any(v) for v in dropped.values())


def test_pictures_are_normalised_resized_and_cut_like_clip_does():
    """Against PIL's bicubic filter on 8 bits: within a rounding step of each of its two passes."""
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (6, 9, 3), np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((72, 48), Image.BICUBIC))
    got = np.asarray(clip_pixels(jnp.asarray(picture / 255.0, jnp.float32)[None], 16)[0])
    want = np.asarray(Image.fromarray(picture).resize((24, 16), Image.BICUBIC))[:, 4:20] / 255.0
    back = got * np.array(conditioning.STD) + np.array(conditioning.MEAN)
    assert np.abs(back - want).max() < 2.5 / 255
    same = clip_pixels(jnp.full((1, 16, 16, 3), 0.5), 16)
    want = (0.5 - np.array(conditioning.MEAN)) / np.array(conditioning.STD)
    np.testing.assert_allclose(same[0, 3, 5], want, rtol=1e-5)

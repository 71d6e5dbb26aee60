"""Single files of Stable Diffusion against diffusers' own reading of them."""

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils

from cnxs_jax.convert import rules, single_file
from cnxs_jax.pipelines import load
from tests.parity.helpers import perturb

pytestmark = pytest.mark.parity

VAE = dict(
    block_out_channels=(8, 16, 24), layers_per_block=2, norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
)  # fmt: skip
CLIP = dict(
    vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=9, bos_token_id=28, eos_token_id=29,
)  # fmt: skip


def _opened(path, model):
    """`(module, params)` of what PyTorch saves."""
    model.save_pretrained(path)
    return load.load_model(path)


def _torch(tensors, prefix=""):
    return {prefix + k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}


def _equal(theirs, expected):
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[key], value) for key, value in expected.items())


def _round_trip(module, params, table):
    """The tensors, after reading them back gives the same parameters."""
    tensors = rules.to_tensors(params, table)
    back = rules.to_params(tensors, params, table)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again = rules.to_tensors(back, table)
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[key], tensors[key]) for key in tensors)
    return tensors


def test_autoencoder(tmp_path):
    model = perturb(diffusers.AutoencoderKL(**VAE))
    module, params = _opened(tmp_path, model)
    tensors = _round_trip(module, params, single_file.table_of("sd15", "vae", module))
    assert tensors["decoder.mid.attn_1.q.weight"].shape == (24, 24, 1, 1)
    assert len(tensors) == len(model.state_dict())
    theirs = _torch(tensors, "first_stage_model.")
    theirs = single_file_utils.convert_ldm_vae_checkpoint(theirs, dict(VAE))
    expected = model.state_dict()
    # diffusers reshapes the attention's 1x1 convolutions when it loads the result.
    theirs = {k: v.reshape(expected[k].shape) for k, v in theirs.items()}
    _equal(theirs, expected)


def test_openai_text_encoder(tmp_path):
    config = transformers.CLIPTextConfig(**CLIP, hidden_act="quick_gelu")
    module, params = _opened(tmp_path, perturb(transformers.CLIPTextModel(config)))
    tensors = _round_trip(module, params, single_file.table_of("sd15", "text_encoder", module))
    for prefix in ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."):
        theirs = single_file_utils.convert_ldm_clip_checkpoint(_torch(tensors, prefix))
        assert {k.removeprefix("text_model.") for k in theirs} == {
            k.removeprefix("text_model.") for k in tensors
        }


@pytest.mark.parametrize("kind", ["sd21", "sdxl"])
def test_open_clip_text_encoder(tmp_path, kind):
    projected = kind == "sdxl"
    name = "text_encoder_2" if projected else "text_encoder"
    config = transformers.CLIPTextConfig(**CLIP, hidden_act="gelu", projection_dim=16)
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    model = perturb(cls(config))
    module, params = _opened(tmp_path, model)
    table = single_file.table_of(kind, name, module)
    tensors = _round_trip(module, params, table)
    prefix = single_file.LAYOUTS[kind][name]
    theirs = _torch(tensors, prefix)
    theirs = single_file_utils.convert_open_clip_checkpoint(model, theirs, prefix)
    expected = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    _equal({k.removeprefix("text_model."): v for k, v in theirs.items()}, expected)
    # What the published files hold besides: read past, or refused where it means something else.
    unused = {"logit_scale": np.ones(())}
    if not projected:
        layer = "transformer.resblocks.{}.ln_1.weight".format
        unused |= {layer(2): tensors[layer(0)], "text_projection": np.eye(16, dtype=np.float32)}
    back = rules.to_params(tensors | unused, params, table)
    jax.tree.map(np.testing.assert_array_equal, back, params)

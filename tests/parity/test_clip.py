"""CLIP's encoders against transformers, float32, every parameter perturbed."""

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from cnxs_jax import tree
from cnxs_jax.convert import clip, families, rules
from cnxs_jax.pipelines import load
from tests import checks
from tests.parity import full_size
from tests.parity.helpers import nhwc, perturb, relative_error

pytestmark = pytest.mark.parity

TEXT = dict(
    vocab_size=30,
    hidden_size=12,
    intermediate_size=20,
    projection_dim=10,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=9,
    bos_token_id=27,
    eos_token_id=28,
    pad_token_id=1,
)
IMAGE = dict(
    hidden_size=12,
    intermediate_size=20,
    projection_dim=10,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=12,
    patch_size=4,
)
# Padded with the end token as OpenAI's tokenizer does, padded with 0 as OpenCLIP's, and with an
# added token above the end token.
IDS = np.array([[27, 3, 4, 28, 28, 28, 28], [27, 5, 28, 0, 0, 0, 0], [27, 29, 6, 7, 28, 0, 0]])
TEXTS = {
    "vit_l": (transformers.CLIPTextModel, {}),
    "legacy_eos": (transformers.CLIPTextModel, {"eos_token_id": 2}),
    "open_clip_h": (transformers.CLIPTextModel, {"hidden_act": "gelu"}),
    "big_g": (transformers.CLIPTextModelWithProjection, {"hidden_act": "gelu"}),
    "one_layer": (transformers.CLIPTextModelWithProjection, {"num_hidden_layers": 1}),
}
PUBLISHED = {
    "vit_l": (
        transformers.CLIPTextModel,
        dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    ),
    "open_clip_h": (
        transformers.CLIPTextModel,
        dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_attention_heads=16,
            num_hidden_layers=23,
            hidden_act="gelu",
        ),
    ),
    "big_g": (
        transformers.CLIPTextModelWithProjection,
        dict(
            hidden_size=1280,
            intermediate_size=5120,
            num_attention_heads=20,
            num_hidden_layers=32,
            projection_dim=1280,
            hidden_act="gelu",
        ),
    ),
    "vit_l_image": (
        transformers.CLIPVisionModelWithProjection,
        dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_attention_heads=16,
            num_hidden_layers=24,
            projection_dim=768,
            patch_size=14,
        ),
    ),
}


def make_text(name):
    cls, changes = TEXTS[name]
    torch.manual_seed(0)
    return perturb(cls(transformers.CLIPTextConfig(**(TEXT | changes))))


def make_image():
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**IMAGE)
    return perturb(transformers.CLIPVisionModelWithProjection(config))


def text_errors(model, module, params, ids, mask=None):
    """{output: relative error} of a text encoder."""
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        theirs = model(
            torch.tensor(ids),
            None if mask is None else torch.tensor(mask),
            output_hidden_states=True,
        )
        ours = jax.jit(module.apply)({"params": params}, ids, mask)
    expected = {
        "last": theirs.last_hidden_state,
        "penultimate": theirs.hidden_states[-2],
        "pooled": theirs["text_embeds" if "text_embeds" in theirs else "pooler_output"],
    }
    return {key: float(relative_error(ours[key], value)) for key, value in expected.items()}


def compare_text(model, module, params, mask=None):
    assert max(text_errors(model, module, params, IDS, mask).values()) <= 1e-5


@pytest.mark.parametrize("name", TEXTS)
def test_text(tmp_path, name):
    model = make_text(name)
    model.save_pretrained(tmp_path)
    module, params = load.load_model(tmp_path)
    assert type(module).__name__ == type(model).__name__
    compare_text(model, module, params)


def test_text_with_a_mask(tmp_path):
    model = make_text("vit_l")
    model.save_pretrained(tmp_path)
    mask = np.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1] * 7])
    compare_text(model, *load.load_model(tmp_path), mask)


def test_image(tmp_path):
    model = make_image()
    model.save_pretrained(tmp_path)
    module, params = load.load_model(tmp_path)
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = model(x).image_embeds
        out = jax.jit(module.apply)({"params": params}, nhwc(x))
    assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("name", [*TEXTS, "image"])
def test_saved_by_us_opens_in_transformers(tmp_path, name):
    model = make_image() if name == "image" else make_text(name)
    model.save_pretrained(tmp_path / "theirs")
    load.save_model(*load.load_model(tmp_path / "theirs"), tmp_path / "ours")
    back, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs, ours = model.state_dict(), back.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    for key in IMAGE if name == "image" else set(TEXT) - {"bos_token_id"}:
        assert getattr(back.config, key) == getattr(model.config, key), key


def test_files_of_transformers_4_hold_the_same(tmp_path):
    """They have `text_model.` before every name and the constant `position_ids`."""
    make_text("vit_l").save_pretrained(tmp_path)
    module, params = load.load_model(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {f"text_model.{key}": value for key, value in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(9)[None]
    save_file(tensors, file)
    again, other = load.load_model(tmp_path)
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, other, params)
    load.save_model(module, params, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == tensors.keys() - {"text_model.embeddings.position_ids"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_transformers_tensors(name):
    cls, config = PUBLISHED[name]
    with torch.device("meta"):
        model = cls(cls.config_class(**config))
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if cls is transformers.CLIPTextModel:  # version 5 leaves the prefix out
        expected = {f"text_model.{key}": shape for key, shape in expected.items()}
    table = clip.VISION if "image" in name else clip.TEXT
    family = families.family_of({"_class_name": cls.__name__}, "config")
    _, target = families.build(family, config, "config")
    ours = {}
    for path, leaf in tree.flatten(target).items():
        keys = rules.keys_of(path, leaf.shape, table)
        shape = leaf.shape[1:] if "encoder/layers" in path else leaf.shape
        ours |= {key: rules.to_torch_shape(path, shape) for key in keys}
    assert ours == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_l", "open_clip_h"])
def test_text_encoders_of_published_sizes(tmp_path, name):
    """SD 1.5's and SD 2.1's, weights drawn; a minute and 4 GB each."""
    cls, config = PUBLISHED[name]
    model = full_size.draw(cls(cls.config_class(**config)))
    model.save_pretrained(tmp_path)
    end, pad = 49407, 49407 if name == "vit_l" else 0
    ids = np.random.default_rng(0).integers(1, 49406, (2, 77))
    ids[:, 0] = 49406
    for row, length in zip(ids, (9, 76), strict=True):
        row[length:] = pad
        row[length] = end
    errors = text_errors(model, *load.load_model(tmp_path), ids)
    print(f"{name}: {errors}")
    checks.record(f"CLIP text encoder {name} against transformers", **errors)
    assert max(errors.values()) <= 1e-5

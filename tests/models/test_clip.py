"""CLIP's encoders on their own: what depends on what, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import tree
from cnxs_jax.errors import ConfigError
from cnxs_jax.models import clip

TINY = dict(
    vocab_size=30,
    hidden_size=8,
    intermediate_size=12,
    projection_dim=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=6,
    eos_token_id=28,
)
IMAGE = dict(
    hidden_size=8,
    intermediate_size=12,
    projection_dim=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
IDS = np.array([[27, 3, 4, 28, 0, 0], [27, 5, 28, 29, 0, 0]])


def noisy(module, *example):
    init = jax.jit(module.init)(jax.random.key(0), *example)["params"]
    leaves, treedef = jax.tree.flatten(init)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


@pytest.fixture(scope="module")
def text():
    module = clip.CLIPTextModelWithProjection(**TINY)
    return module, noisy(module, IDS)


def run(module, params, *args):
    return jax.jit(module.apply)({"params": params}, *args)


def test_published_parameter_counts():
    def count(module, *example):
        return tree.size(jax.eval_shape(module.init, jax.random.key(0), *example))

    wide = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    giant = dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=20)
    giant |= dict(num_hidden_layers=32, projection_dim=1280)
    assert count(clip.CLIPTextModel(), IDS) == 123_060_480
    assert count(clip.CLIPTextModel(**wide, num_hidden_layers=23), IDS) == 340_387_840
    assert count(clip.CLIPTextModelWithProjection(**giant), IDS) == 694_659_840
    image = clip.CLIPVisionModelWithProjection()
    assert count(image, jnp.zeros((1, 224, 224, 3))) == 303_966_208


def test_a_token_depends_on_those_before_it_only(text):
    module, params = text
    changed = IDS.copy()
    changed[0, 2] = 9
    before, after = run(module, params, IDS), run(module, params, changed)
    for key in ("last", "penultimate"):
        np.testing.assert_array_equal(before[key][0, :2], after[key][0, :2])
        assert np.abs(before[key][0, 2:] - after[key][0, 2:]).max(axis=-1).min() > 1e-3
        np.testing.assert_array_equal(before[key][1], after[key][1])


def test_pooled_is_the_projected_end_token(text):
    module, params = text
    out = run(module, params, IDS)
    kernel = params["text_projection"]["kernel"]
    expected = np.stack([out["last"][0, 3] @ kernel, out["last"][1, 2] @ kernel])
    np.testing.assert_allclose(out["pooled"], expected, atol=1e-5)
    # Old configs: the place of the largest id, here an added token of the second text.
    legacy = run(module.clone(eos_token_id=2), params, IDS)
    np.testing.assert_allclose(legacy["pooled"][0], expected[0], atol=1e-5)
    np.testing.assert_allclose(legacy["pooled"][1], out["last"][1, 3] @ kernel, atol=1e-5)


def test_penultimate_is_one_layer_less(text):
    module, params = text
    shorter = module.clone(num_hidden_layers=1)
    encoder = params["text_model"]["encoder"]["layers"]
    first = jax.tree.map(lambda p: p[:1], encoder)
    cut = {**params, "text_model": {**params["text_model"], "encoder": {"layers": first}}}
    norm = params["text_model"]["final_layer_norm"]
    h = run(module, params, IDS)["penultimate"]
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    expected = h * norm["scale"][None, None] + norm["bias"][None, None]
    np.testing.assert_allclose(run(shorter, cut, IDS)["last"], expected, atol=1e-5)


def test_masked_tokens_do_not_count(text):
    module, params = text
    mask = np.ones_like(IDS)
    mask[:, 1] = 0
    changed = IDS.copy()
    changed[:, 1] = 11
    before, after = run(module, params, IDS, mask), run(module, params, changed, mask)
    np.testing.assert_allclose(before["last"][:, 2:], after["last"][:, 2:], atol=1e-6)
    assert np.abs(run(module, params, IDS)["last"] - before["last"])[:, 2:].max() > 1e-3


def test_bfloat16_is_close_and_returns_float32(text):
    module, params = text
    exact = run(module, params, IDS)
    rough = run(module.clone(dtype=jnp.bfloat16), params, IDS)
    for key, value in exact.items():
        assert rough[key].dtype == jnp.float32
        assert 1e-5 < np.abs(rough[key] - value).max() / np.abs(value).max() < 0.05


def test_every_patch_of_an_image_counts():
    module = clip.CLIPVisionModelWithProjection(**IMAGE)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    params = noisy(module, x)
    out = run(module, params, x)
    assert out.shape == (2, 6)
    for row in (0, 4):
        for column in (0, 4):
            changed = x.copy()
            changed[0, row, column] += 1.0
            other = run(module, params, changed)
            assert np.abs(other[0] - out[0]).max() > 1e-4
            np.testing.assert_allclose(other[1], out[1], atol=1e-6)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((IDS[0],), r"must both be \[B,L\]"),
        ((IDS, np.ones((2, 5))), r"must both be \[B,L\]"),
        ((np.tile(IDS, 2),), "12 tokens, the model has 6 positions"),
    ],
)
def test_bad_texts_are_refused(args, words):
    with pytest.raises(ConfigError, match=words):
        jax.eval_shape(clip.CLIPTextModel(**TINY).init, jax.random.key(0), *args)


@pytest.mark.parametrize("changes", [dict(hidden_act="quick-gelu"), dict(num_attention_heads=3)])
def test_bad_configs_are_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        jax.eval_shape(clip.CLIPTextModel(**TINY | changes).init, jax.random.key(0), IDS)


def test_images_of_another_size_are_refused():
    module = clip.CLIPVisionModelWithProjection(**IMAGE)
    with pytest.raises(ConfigError, match=r"expected \[B,8,8,3\], got \[1, 8, 12, 3\]"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 12, 3)))

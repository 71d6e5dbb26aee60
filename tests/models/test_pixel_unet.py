"""The pixel UNet: encoders that are masked or missing, null tokens, super-resolution, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import tree
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.pixel_unet import Context, PixelUNet
from cnxs_jax.pipelines import load

BASE = {
    "block_out_channels": (8, 16),
    "layers_per_block": (1, 1),
    "self_attention": (False, True),
    "cross_attention": (False, True),
    "attention_head_dim": 8,
    "cross_attention_dim": 12,
    "text_dim": 6,
    "clip_text_dim": 5,
    "clip_image_dim": 7,
    "pooled_dim": 4,
    "norm_num_groups": 4,
}
STAGE = BASE | {
    "efficient": True,
    "self_attention": (False, False),
    "low_res_channels": 3,
}
B = 2
T = jnp.array([-0.3, 0.8])
X = jax.random.normal(jax.random.key(0), (B, 8, 8, 3))


def encoders(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"text": (B, 4, 6), "clip_text": (B, 3, 5), "clip_image": (B, 7), "pooled": (B, 4)}
    cond = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    masks = {
        "text_mask": jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "clip_text_mask": jnp.array([[1, 1, 1], [0, 0, 0]]),
        "clip_image_mask": jnp.array([0, 1]),
    }
    return cond | masks


COND = encoders()
LOW = COND | {
    "low_res": jax.random.normal(jax.random.key(1), (B, 4, 4, 3)),
    "low_res_noise": jnp.array([0.0, 0.2]),
}


def noisy_params(fields, cond, x=X):
    """Random weights everywhere: layers that start at zero would hide what they read."""
    shapes = jax.eval_shape(PixelUNet(**fields).init, jax.random.key(0), x, T, cond)["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(3)
    values = [
        jnp.asarray(rng.normal(size=s.shape) * max(np.prod(s.shape[:-1]), 1) ** -0.5, jnp.float32)
        for s in leaves
    ]
    return jax.tree.unflatten(treedef, values)


def runner(fields, cond):
    params = noisy_params(fields, cond)
    step = jax.jit(lambda x, t, cond: PixelUNet(**fields).apply({"params": params}, x, t, cond))
    return lambda cond, x=X, t=T: np.asarray(step(x, t, cond))


@pytest.fixture(scope="module")
def base():
    return runner(BASE, COND)


@pytest.fixture(scope="module")
def stage():
    return runner(STAGE, LOW)


def without(cond, *names):
    return {k: v for k, v in cond.items() if k not in names}


def test_it_starts_as_zero_and_has_the_shape_of_its_input():
    """Zero-initialised: in EDM form the untrained denoiser is c_skip x."""
    module = PixelUNet(**BASE)

    @jax.jit
    def untrained(key):
        return module.apply(module.init(key, X, T, COND), X, T, COND)

    np.testing.assert_array_equal(untrained(jax.random.key(0)), jnp.zeros_like(X))


def test_what_is_masked_never_matters_not_even_as_nan(base):
    want = base(COND)
    assert np.all(np.isfinite(want))
    nan = jnp.nan
    other = COND | {
        "text": COND["text"].at[0, 2:].set(nan),
        "clip_text": COND["clip_text"].at[1].set(nan),
        "clip_image": COND["clip_image"].at[0].set(nan),
        "pooled": COND["pooled"].at[1].set(nan),  # follows the mask of the CLIP text
    }
    np.testing.assert_array_equal(base(other), want)


@pytest.mark.parametrize("name", ["text", "clip_text", "clip_image", "pooled"])
def test_each_encoder_is_read_where_it_is_real_and_only_there(base, name):
    changed = COND | {name: COND[name] + 1.0}
    difference = np.abs(base(changed) - base(COND)).max((1, 2, 3)) > 1e-5
    real = {"text": [1, 1], "clip_text": [1, 0], "clip_image": [0, 1], "pooled": [1, 0]}[name]
    np.testing.assert_array_equal(difference, np.array(real, bool))


@pytest.mark.parametrize(
    ("encoder", "names"),
    [
        ("text", ("text",)),
        ("clip_text", ("clip_text", "pooled")),
        ("clip_image", ("clip_image",)),
    ],
)
def test_a_missing_encoder_is_a_masked_one(base, encoder, names):
    mask = f"{encoder}_mask"
    masked = base(COND | {mask: jnp.zeros_like(COND[mask])})
    np.testing.assert_allclose(base(without(COND, mask, *names)), masked, rtol=1e-5, atol=1e-5)
    assert np.abs(masked - base(COND)).max() > 1e-3


def test_unconditional_is_finite_with_finite_gradients():
    params = noisy_params(BASE, COND)
    zeros = {k: jnp.zeros_like(v) for k, v in COND.items() if k.endswith("_mask")}
    nothing = {k: jnp.full_like(v, jnp.nan) for k, v in COND.items() if k not in zeros} | zeros

    @jax.jit
    @jax.value_and_grad
    def loss(params, cond):
        return jnp.square(PixelUNet(**BASE).apply({"params": params}, X, T, cond)).mean()

    value, grads = loss(params, nothing)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert np.abs(grads["context"]["null_tokens"]).max() > 0
    assert np.abs(grads["context"]["text_proj"]["kernel"]).max() == 0


@pytest.mark.parametrize("num_null", [1, 3])
def test_the_context_ends_with_null_tokens_that_are_always_real(num_null):
    module = Context(12, (("text", 6), ("clip_image", 7)), num_null, jnp.float32)
    params = module.init(jax.random.key(0), COND, B)
    tokens, mask = module.apply(params, COND, B)
    assert tokens.shape == (B, 4 + 1 + num_null, 12)
    np.testing.assert_array_equal(mask[:, -num_null:], 1)
    np.testing.assert_array_equal(mask[:, :4], COND["text_mask"])
    np.testing.assert_array_equal(mask[:, 4], COND["clip_image_mask"])
    null = params["params"]["null_tokens"]
    np.testing.assert_array_equal(tokens[1, -num_null:], null)
    tokens, mask = module.apply(params, {}, B)
    np.testing.assert_array_equal(tokens[0], null)
    np.testing.assert_array_equal(mask, jnp.ones((B, num_null)))


def test_the_image_embedding_may_enter_through_the_time_embedding():
    run = runner(BASE | {"clip_image_as": "time"}, COND)
    changed = COND | {"clip_image": COND["clip_image"] + 1.0}
    difference = np.abs(run(changed) - run(COND)).max((1, 2, 3)) > 1e-5
    np.testing.assert_array_equal(difference, [False, True])


def test_low_resolution_picture_and_its_noise_level_reach_the_output(stage):
    want = stage(LOW)
    assert want.shape == X.shape
    for name in ("low_res", "low_res_noise"):
        moved = np.abs(stage(LOW | {name: LOW[name] + 0.1}) - want).max((1, 2, 3))
        assert moved.min() > 1e-4, name
    clean = LOW | {"low_res_noise": jnp.zeros(B)}
    np.testing.assert_allclose(stage(without(LOW, "low_res_noise")), stage(clean), atol=1e-6)


def test_a_stage_that_saw_crops_runs_on_larger_pictures(stage):
    """No layer of it holds the size: fully convolutional, cross-attention by pixel."""
    x = jnp.concatenate([X, X], axis=2)
    low = LOW | {"low_res": jnp.concatenate([LOW["low_res"], LOW["low_res"]], axis=2)}
    assert stage(low, x).shape == (B, 8, 16, 3)


def test_painted_words_move_the_picture_and_a_zero_mask_does_not(base):
    mask = jnp.zeros((B, 8, 8, 7)).at[:, :, :4, 1].set(1.0)  # text and CLIP text, not the rest
    words = {"word_weight": jnp.full(B, 2.0), "sigma": jnp.exp(4 * T)}
    plain = base(COND)
    np.testing.assert_array_equal(base(COND | words | {"word_mask": 0 * mask}), plain)
    assert np.abs(base(COND | words | {"word_mask": mask}) - plain).max() > 1e-3


def test_time_matters(base):
    assert np.abs(base(COND, t=T + 0.01) - base(COND)).max((1, 2, 3)).min() > 1e-4


def test_super_resolution_attends_only_where_it_is_told():
    def names(fields, x, cond):
        module = PixelUNet(**fields)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x, T, cond)["params"]
        return tree.flatten(shapes)

    assert not [n for n in names(STAGE, X, LOW) if "attn1" in n]
    assert [n for n in names(STAGE, X, LOW) if "attn2" in n]
    assert [n for n in names(BASE, X, COND) if "mid_block_attentions_0/attn1" in n]
    assert not [n for n in names(BASE, X, COND) if "down_blocks_0_attentions" in n]


@pytest.mark.parametrize(("fields", "cond"), [(BASE, COND), (STAGE, LOW)])
def test_it_is_stored_and_opened(fields, cond, tmp_path):
    module, params = PixelUNet(**fields), noisy_params(fields, cond)
    load.save_model(module, params, tmp_path)
    again, other = load.load_model(tmp_path)
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, other, params)


@pytest.mark.parametrize(
    ("fields", "cond", "size", "message"),
    [
        (STAGE, COND, (8, 8), "needs a picture"),
        (STAGE, LOW, (8, 6), "8x6 is not divisible by 4"),
        (BASE, COND, (8, 7), "8x7 is not divisible by 2"),
        (BASE | {"layers_per_block": (1,)}, COND, (8, 8), "different lengths"),
        (BASE | {"clip_image_as": "tokn"}, COND, (8, 8), "tokn"),
        (BASE | {"text_dim": 9}, COND, (8, 8), "6 channels, but the network takes 9"),
    ],
)
def test_mistakes_are_refused(fields, cond, size, message):
    x = jnp.zeros((B, *size, 3))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(PixelUNet(**fields).init, jax.random.key(0), x, T, cond)

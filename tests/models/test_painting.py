"""The score bias of paint-with-words: against the published formula, and what it must not touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.diffusion import guidance, sampling, schedule, solvers
from cnxs_jax.errors import ConfigError
from cnxs_jax.models import attention as forms
from cnxs_jax.models.attention import attention
from cnxs_jax.models.dit import PixArt
from cnxs_jax.models.painting import paint_at, resize, score_bias

DIT = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "sample_size": 8,
    "cross_attention_dim": 24,
    "caption_channels": 6,
}
B, SIZE, L = 2, (8, 8), 5
MASK = np.array([[1, 1, 1, 0, 0], [1] * 5])
LEFT = np.zeros((B, *SIZE, L), np.float32)
LEFT[:, :, :4, 1] = 1.0


def condition(seed=0, **words):
    text = np.random.default_rng(seed).normal(size=(B, L, 6)).astype(np.float32)
    return {"text": jnp.asarray(text), "text_mask": MASK, **words}


def painted(mask, weight=0.5, sigma=5.0):
    words = {"word_mask": jnp.asarray(mask), "word_weight": jnp.full(B, weight)}
    return condition(**words, sigma=jnp.full(B, sigma))


X = jax.random.normal(jax.random.key(7), (B, *SIZE, 4))
T = jnp.full(B, 700.0)


@pytest.fixture(scope="module")
def params():
    init = PixArt(**DIT).init(jax.random.key(0), X, T, condition())["params"]
    leaves, treedef = jax.tree.flatten(init)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


@pytest.fixture(scope="module")
def run(params):
    step = jax.jit(lambda x, cond: PixArt(**DIT).apply({"params": params}, x, T[: len(x)], cond))
    return lambda cond, x=X: np.asarray(step(x, cond))


def qkv(length=64, keys=5, heads=2, dim=8):
    rng = np.random.default_rng(0)
    shapes = ((B, length, heads, dim), (B, keys, heads, dim), (B, keys, heads, dim))
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def test_bias_is_the_published_formula_with_the_maximum_of_each_example_and_head():
    q, k, v = qkv()
    cond = painted(LEFT, weight=0.3, sigma=4.0)
    out = attention(q, k, v, mask_BxS=MASK, bias=score_bias(paint_at(cond, SIZE, L), q, k, MASK))
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    for b, h in np.ndindex(B, 2):
        real = MASK[b] > 0
        scores = q[b, :, h] @ k[b, real, h].T
        w = 0.3 * np.log(5.0) * scores.max()
        scores = (scores + w * LEFT[b].reshape(64, L)[:, real]) / np.sqrt(8)
        weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        np.testing.assert_allclose(out[b, :, h], weights @ v[b, real, h], atol=2e-5)


@pytest.mark.parametrize("counted", [False, True])
def test_tokens_that_do_not_count_are_not_the_maximum(counted):
    """A start token draws scores far above the words'; it may be left out of the maximum."""
    q, k, _ = qkv()
    k = k.at[:, 0].multiply(100.0)
    words = {"word_tokens": jnp.asarray([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]])} if counted else {}
    top = score_bias(paint_at(painted(LEFT) | words, SIZE, L), q, k, MASK).max()
    assert (float(top) < 5.0) == counted


@pytest.mark.parametrize("words", [{}, {"word_tokens": jnp.ones((B, L), jnp.int32)}])
def test_padding_and_masked_keys_do_not_move_the_bias(words):
    q, k, _ = qkv()
    paint = paint_at(painted(LEFT) | words, SIZE, L)
    want = score_bias(paint, q, k, MASK)
    np.testing.assert_array_equal(score_bias(paint, q, k.at[0, 3:].add(99.0), MASK), want)
    empty = score_bias(paint, q, k, np.zeros_like(MASK))
    np.testing.assert_array_equal(empty, np.zeros_like(want))


@pytest.mark.parametrize("impl", ["xla", "blocked"])
def test_zero_bias_is_no_bias_to_the_bit_in_every_form(impl, monkeypatch):
    monkeypatch.setattr(forms, "BLOCK", 24)
    q, k, v = qkv()
    zero = score_bias(paint_at(painted(0 * LEFT), SIZE, L), q, k, MASK)
    plain = attention(q, k, v, mask_BxS=MASK, impl=impl)
    np.testing.assert_array_equal(attention(q, k, v, mask_BxS=MASK, bias=zero, impl=impl), plain)


def test_forms_agree_on_a_bias_by_query(monkeypatch):
    monkeypatch.setattr(forms, "BLOCK", 24)  # 64 queries: three blocks, the last one padded
    q, k, v = qkv()
    bias = score_bias(paint_at(painted(LEFT), SIZE, L), q, k, MASK)
    one, other = (attention(q, k, v, mask_BxS=MASK, bias=bias, impl=i) for i in ("xla", "blocked"))
    np.testing.assert_allclose(one, other, atol=2e-6)
    assert np.abs(one - attention(q, k, v, mask_BxS=MASK)).max() > 0.05


def test_nothing_painted_is_the_plain_network_to_the_bit(run):
    plain = run(condition())
    np.testing.assert_array_equal(run(painted(0 * LEFT)), plain)
    np.testing.assert_array_equal(run(painted(LEFT, weight=0.0)), plain)
    np.testing.assert_array_equal(run(painted(LEFT, sigma=0.0)), plain)
    assert np.abs(run(painted(LEFT)) - plain).max() > 1e-3


def test_a_picture_does_not_depend_on_its_batch(run):
    cond = painted(LEFT)
    whole = run(cond)
    for i in range(B):
        alone = run(jax.tree.map(lambda a, i=i: a[i : i + 1], cond), X[i : i + 1])
        np.testing.assert_allclose(alone[0], whole[i], rtol=1e-4, atol=1e-5)


def test_paint_on_masked_tokens_changes_nothing(run):
    mask = np.zeros_like(LEFT)
    mask[0, ..., 3:] = 1.0  # example 0 has three real tokens
    np.testing.assert_array_equal(run(painted(mask)), run(condition()))


def test_resize_takes_shares_and_other_ratios_stay_within_the_mask():
    halves = resize(jnp.asarray(LEFT), (4, 4))
    np.testing.assert_array_equal(halves[0, 0, :, 1], [1, 1, 0, 0])
    np.testing.assert_array_equal(resize(jnp.asarray(LEFT), (8, 2))[0, 0, :, 1], [1, 0])
    odd = np.asarray(resize(jnp.asarray(LEFT), (3, 5)))
    assert odd.min() >= 0.0
    assert odd.max() <= 1.0
    assert odd[0, 0, 0, 1] == pytest.approx(1.0)
    assert np.all(odd[..., 0] == 0.0)


def test_the_loop_writes_the_level_and_guidance_paints_one_half(params):
    """With the unconditional weight zero, a guidance scale of 0 shows no painting at all."""
    noise = schedule.linear()
    null = {"text": jnp.zeros((B, L, 6)), "word_weight": jnp.zeros(B)}
    words = {"word_mask": jnp.asarray(LEFT), "word_weight": jnp.full(B, 0.5)}
    denoise = guidance.cfg(sampling.denoiser(PixArt(**DIT)))

    @jax.jit
    def pictures(scale, words):
        own = {k: v for k, v in null.items() if k in words or k == "text"}
        cond = condition(**words, null=own, guidance_scale=jnp.full(B, scale))
        return sampling.sample(denoise, params, X, cond, solvers.ddim(noise, 2))

    np.testing.assert_allclose(pictures(0.0, words), pictures(0.0, {}), rtol=1e-4, atol=1e-4)
    assert np.abs(pictures(1.0, words) - pictures(1.0, {})).max() > 1e-2


@pytest.mark.parametrize("missing", ["sigma", "word_weight"])
def test_missing_inputs_are_named(missing):
    cond = {k: v for k, v in painted(LEFT).items() if k != missing}
    with pytest.raises(ConfigError, match=missing):
        paint_at(cond, SIZE, L)


def test_more_columns_than_tokens_are_refused_and_fewer_are_filled():
    with pytest.raises(ConfigError, match="5 painted columns"):
        paint_at(painted(LEFT), SIZE, 4)
    assert paint_at(painted(LEFT), SIZE, 7).words_BxNxS.shape == (B, 64, 7)

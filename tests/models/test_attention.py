"""Every form of attention against the plain one, and what a mask must and must not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.errors import ConfigError
from cnxs_jax.models import attention as forms
from cnxs_jax.models.attention import attention, sincos_2d


def qkv(length=96, keys=40, heads=3, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, length, heads, dim), (2, keys, heads, dim), (2, keys, heads, dim))
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)


def plain(q, k, v, mask=None):
    """float64 numpy, one (batch, head, query) at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(*q.shape[:3]):
        keep = np.ones(k.shape[1], bool) if mask is None else np.asarray(mask[b]) > 0
        logits = k[b, keep, h] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights @ v[b, keep, h] / weights.sum()
    return out


MASK = np.array([[1] * 7 + [0] * 33, [1] * 40])


@pytest.mark.parametrize("impl", ["xla", "blocked", "splash_interpret"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_forms_agree_with_float64(impl, mask):
    q, k, v = qkv()
    with jax.default_matmul_precision("highest"):
        out = attention(q, k, v, mask_BxS=mask, impl=impl)
    assert np.abs(out - plain(q, k, v, mask)).max() < 2e-6


@pytest.mark.parametrize("impl", ["xla", "blocked"])
def test_blocks_of_queries_and_gradients(impl, monkeypatch):
    monkeypatch.setattr(forms, "BLOCK", 32)  # 96 + 5 queries: four blocks, the last one padded
    q, k, v = qkv(length=101)

    def loss(form, *args):
        return jnp.sum(jnp.sin(attention(*args, mask_BxS=MASK, impl=form)))

    with jax.default_matmul_precision("highest"):
        ours = jax.grad(loss, (1, 2, 3))(impl, q, k, v)
        reference = jax.grad(loss, (1, 2, 3))("xla", q, k, v)
    assert np.abs(attention(q, k, v, impl=impl) - plain(q, k, v)).max() < 2e-6
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["xla", "blocked"])
def test_masked_keys_have_no_influence_and_no_row_is_nan(impl):
    q, k, v = qkv()
    out = attention(q, k, v, mask_BxS=MASK, impl=impl)
    other = attention(q, k.at[0, 7:].add(9.0), v.at[0, 7:].add(9.0), mask_BxS=MASK, impl=impl)
    np.testing.assert_array_equal(out, other)
    nothing = attention(q, k, v, mask_BxS=np.zeros((2, 40), int), impl=impl)
    mean = jnp.broadcast_to(v.mean(1, keepdims=True), q.shape)
    np.testing.assert_allclose(nothing, mean, atol=1e-6)


@pytest.mark.parametrize("impl", ["xla", "blocked"])
def test_bias_enters_before_the_softmax(impl):
    q, k, v = qkv()
    bias = jnp.zeros((1, 1, 1, 40)).at[..., 3].set(1e4)
    out = attention(q, k, v, bias=bias, impl=impl)
    np.testing.assert_allclose(out, jnp.broadcast_to(v[:, 3:4], q.shape), atol=1e-6)


def test_choice_on_a_cpu_is_by_length():
    q, k, _ = qkv(length=1024, keys=1024)
    assert forms.choose(q, k, None, None) == "blocked"
    assert forms.choose(q, k[:, :77], None, None) == "xla"


def test_splash_lowers_for_tpu():
    q, k, v = qkv(length=1024, keys=1024, dim=72)
    run = jax.jit(lambda q, k, v: attention(q, k, v, impl="splash"))
    lowered = run.trace(q, k, v).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_unknown_form_names_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "blocked"'):
        attention(*qkv(), impl="blockd")


def test_position_table_of_published_sizes():
    """Values of PixArt-alpha's `get_2d_sincos_pos_embed`, read off its own code."""
    square = sincos_2d(1152, 64, 64, 64, 2)
    assert abs(np.abs(square).mean() - 0.573272) < 1e-6
    np.testing.assert_allclose(square[65][:2], [0.479426, 0.465556], atol=1e-6)
    wide = sincos_2d(1152, 48, 80, 64, 2)
    np.testing.assert_allclose(wide[1][:3], [0.389418, 0.377792, 0.366474], atol=1e-6)
    np.testing.assert_allclose(wide[80][576:579], [0.618370, 0.601745, 0.585390], atol=1e-6)


@pytest.mark.parametrize("impl", ["xla", "blocked", "cudnn", "splash"])
def test_the_named_form_is_the_one_that_runs(impl, monkeypatch):
    monkeypatch.setitem(forms.FORMS, impl, lambda q, *_: q + 1)
    q, k, v = qkv()
    np.testing.assert_array_equal(attention(q, k, v, impl=impl), q + 1)

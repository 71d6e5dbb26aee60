"""Every form of attention against the plain one, and what a mask must and must not do."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from cnxs_jax import sharding
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


def test_blocks_of_queries_and_gradients(monkeypatch):
    monkeypatch.setattr(forms, "BLOCK", 32)  # 96 + 5 queries: four blocks, the last one padded
    q, k, v = qkv(length=101)

    def loss(form, *args):
        return jnp.sum(jnp.sin(attention(*args, mask_BxS=MASK, impl=form)))

    with jax.default_matmul_precision("highest"):
        ours = jax.grad(loss, (1, 2, 3))("blocked", q, k, v)
        reference = jax.grad(loss, (1, 2, 3))("xla", q, k, v)
    assert np.abs(attention(q, k, v, impl="blocked") - plain(q, k, v)).max() < 2e-6
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("queries", [1, 101])  # of the bias: the same for all, each its own
@pytest.mark.parametrize("block", [32, 128])  # several blocks, one
def test_gradients_of_all_inputs_with_a_bias(block, queries, monkeypatch):
    monkeypatch.setattr(forms, "BLOCK", block)
    q, k, v = qkv(length=101)
    bias = jax.random.normal(jax.random.key(9), (1, q.shape[2], queries, k.shape[1]))
    mask = np.concatenate([MASK[:1], np.zeros((1, 40), int)])  # a row without any real key

    def loss(form, *args):
        return jnp.sum(jnp.sin(attention(*args[:3], bias=args[3], mask_BxS=mask, impl=form)))

    with jax.default_matmul_precision("highest"):
        ours = jax.grad(loss, (1, 2, 3, 4))("blocked", q, k, v, bias)
        reference = jax.grad(loss, (1, 2, 3, 4))("xla", q, k, v, bias)
    for a, b in zip(ours, reference, strict=True):
        assert np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shared", [0.0, 1.0, 10.0])
def test_what_all_keys_share_does_not_blur_the_gradient(shared):
    """The gradient of a query is a sum of keys whose weights cancel; 1e-3 and 1e-1 by the rule."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(0.1 * rng.normal(size=(1, 600, 2, 8)), jnp.float32) for _ in range(3))
    k, v = (x + shared * jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32) for x in (k, v))
    g = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    found = jax.vjp(lambda *qkv: attention(*qkv, impl="blocked"), q, k, v)[1](g)[0]
    wide = [np.asarray(x, np.float64) for x in (q, k, v, g)]
    logits = np.einsum("blhd,bshd->bhls", *wide[:2]) / np.sqrt(8)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    slopes = np.einsum("blhd,bshd->bhls", wide[3], wide[2])
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True))
    exact = np.einsum("bhls,bshd->blhd", slopes, wide[1]) / np.sqrt(8)
    assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()


def test_half_precision_sums_its_blocks_in_float32(monkeypatch):
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(length=640))
    exact = [x.astype(jnp.float32) for x in (q, k, v)]

    def error(block):
        """Of the gradients of keys and values, relative, in the mean of the squares."""
        monkeypatch.setattr(forms, "BLOCK", block)
        loss = lambda form: lambda *x: jnp.sum(jnp.sin(attention(*x, impl=form)))  # noqa: E731
        ours = jax.grad(loss("blocked"), (1, 2))(q, k, v)
        true = jax.grad(loss("xla"), (1, 2))(*exact)
        pairs = zip(ours, true, strict=True)
        return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)

    assert error(16) < 1.5 * error(640)  # 40 blocks and one


def test_factors_of_two_dtypes():
    q, k, v = qkv()
    for one, other in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)):
        mixed = q.astype(one), k.astype(other), v
        grads = {
            form: jax.grad(lambda *x: jnp.sum(attention(*x, impl=form) ** 2), (0, 1, 2))(*mixed)  # noqa: B023
            for form in ("xla", "blocked")
        }
        for a, b in zip(grads["blocked"], grads["xla"], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(np.float32(a), np.float32(b), atol=0.05)


def test_the_gradient_keeps_no_weights():
    q, k, v = (jnp.zeros((1, 2048, 4, 8)) for _ in range(3))

    def gradients(form):
        run = jax.jit(jax.grad(lambda *x: attention(*x, impl=form).sum(), (0, 1, 2)))
        return run.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert gradients("xla") > 4 * 2048**2 * 4  # it does: [4, 2048, 2048]
    assert gradients("blocked") < 2.5 * 1024 * 2048 * 4 + 16 * q.nbytes  # two blocks' logits


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


HALF, FULL = jnp.bfloat16, jnp.float32
# platform, capability, dtype, (queries, keys), head_dim, masked, biased -> form
CHOICES = [
    ("cpu", None, FULL, (1024, 1024), 64, False, False, "blocked"),
    ("cpu", None, FULL, (1024, 77), 64, True, False, "xla"),
    ("gpu", (8, 0), HALF, (4096, 4096), 72, False, False, "cudnn"),
    ("gpu", (9, 0), jnp.float16, (4096, 120), 72, True, False, "cudnn"),
    ("gpu", (7, 5), jnp.float16, (4096, 4096), 72, False, False, "xla"),  # Colab's T4
    ("gpu", None, HALF, (4096, 4096), 72, False, False, "xla"),  # no NVIDIA card
    ("gpu", (8, 0), FULL, (4096, 4096), 72, False, False, "xla"),
    ("gpu", (8, 0), HALF, (4096, 77), 64, True, False, "xla"),  # CLIP's length with a mask
    ("gpu", (8, 0), HALF, (4096, 77), 64, False, False, "cudnn"),
    ("gpu", (8, 0), HALF, (1023, 120), 64, False, True, "xla"),
    ("gpu", (8, 0), HALF, (1023, 120), 64, False, False, "cudnn"),
    ("gpu", (9, 0), HALF, (4096, 4096), 160, False, False, "xla"),
    ("gpu", (9, 0), HALF, (4096, 4096), 36, False, False, "xla"),
    ("tpu", None, HALF, (1024, 1024), 72, True, False, "splash"),
    ("tpu", None, HALF, (1024, 1024), 72, False, True, "xla"),
    ("tpu", None, HALF, (4096, 120), 72, True, False, "xla"),
]


@pytest.mark.parametrize("row", CHOICES, ids=str)
def test_the_form_is_chosen_by_platform_and_shape(row):
    assert forms.choose(*row[:-1]) == row[-1]


def test_the_choice_is_asked_with_what_is_there(monkeypatch):
    seen = []
    monkeypatch.setattr(forms, "choose", lambda *args: seen.append(args) or "xla")
    attention(*qkv(), mask_BxS=MASK)
    attention(*qkv(), bias=jnp.zeros((1, 1, 1, 40)))
    same = ("cpu", None, jnp.float32, (96, 40), 8)
    assert seen == [(*same, True, False), (*same, False, True)]


@pytest.mark.parametrize(
    ("cards", "least"), [(["9.0", "8.6"], (8, 6)), (["gfx90a"], None), ([None], None)]
)
def test_capability_is_that_of_the_weakest_card(cards, least, monkeypatch):
    devices = [SimpleNamespace(compute_capability=c) for c in cards]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert forms.capability() == least


MESHES = [
    ("blocked", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("blocked", {"expert": 2, "tensor": 4}),
    ("splash_interpret", {"tensor": 2}),
]


@pytest.mark.parametrize(("impl", "spec"), MESHES, ids=str)
def test_forms_stay_split_and_exact_on_a_mesh(impl, spec, monkeypatch):
    """Values and gradients of one device; each device runs its own rows and heads."""
    sizes = []

    def spy(q, *rest):
        sizes.append(q.shape)
        return form(q, *rest)

    form = forms.FORMS[impl]
    q, k, v = (jnp.concatenate([x] * 4) for x in qkv(length=64, heads=4))  # [8, ..., 4, 8]
    mask = np.concatenate([MASK] * 4)

    def run(q, k, v):
        out = attention(q, k, v, mask_BxS=mask, impl=impl)
        return jnp.sum(jnp.sin(out)), out

    step = jax.value_and_grad(run, (0, 1, 2), has_aux=True)
    with jax.default_matmul_precision("highest"):
        (_, alone), gradients = jax.jit(lambda *x: step(*x))(q, k, v)
        monkeypatch.setitem(forms.FORMS, impl, spy)
        mesh = sharding.make_mesh(spec, jax.devices()[: math.prod(spec.values())])
        with jax.set_mesh(mesh):
            put = NamedSharding(mesh, jax.P(sharding.BATCH, None, "tensor"))
            split = jax.device_put((q, k, v), put)
            (_, out), again = jax.jit(lambda *x: step(*x))(*split)
    rows, heads = 8 // sharding.batch_parts(mesh), 4 // mesh.shape["tensor"]
    assert sizes[0] == (rows, 64, heads, 8)
    assert out.sharding.shard_shape(out.shape) == (rows, 64, heads, 8)
    for a, b in zip((alone, *gradients), (out, *again), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_what_the_mesh_does_not_divide_stays_whole():
    q, k, v = qkv()  # 2 rows, 3 heads
    with jax.set_mesh(sharding.make_mesh({"data": 4, "tensor": 2})):
        out = jax.jit(lambda *x: attention(*x, mask_BxS=MASK, impl="blocked"))(q, k, v)
    assert np.abs(out - plain(q, k, v, MASK)).max() < 2e-6


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

"""T5 encoder: properties that need no PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.errors import ConfigError
from cnxs_jax.models import t5

TINY = dict(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2)


@pytest.fixture(scope="module")
def model():
    module = t5.T5Encoder(**TINY)
    params = module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return module, jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


def tokens(batch=2, length=12, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 50)


def test_padding_does_not_reach_the_real_tokens(model):
    module, params = model
    ids = tokens()
    mask = (jnp.arange(12) < 7).astype(jnp.int32)[None].repeat(2, 0)
    out = module.apply({"params": params}, ids, mask)
    other = module.apply({"params": params}, ids.at[:, 7:].set(tokens(seed=1)[:, 7:]), mask)
    short = module.apply({"params": params}, ids[:, :7])
    np.testing.assert_array_equal(out[:, :7], other[:, :7])
    np.testing.assert_allclose(out[:, :7], short, atol=1e-5)
    assert np.abs(module.apply({"params": params}, ids)[:, :7] - short).max() > 1e-3


def test_a_fully_padded_row_is_finite_with_finite_gradients(model):
    module, params = model
    mask = jnp.ones((2, 12), jnp.int32).at[1].set(0)

    def loss(params):
        return jnp.square(module.apply({"params": params}, tokens(), mask)).mean()

    value, grads = jax.value_and_grad(loss)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("remat", [False, True])
def test_the_scan_is_the_loop_over_layers(model, remat):
    module, params = model
    module = module.clone(remat=remat)
    ids, mask = tokens(), jnp.ones((2, 12), jnp.int32).at[1, 5:].set(0)
    block = t5.T5Block(2, 8, 24, "gated-gelu", 1e-6, jnp.float32)

    def unrolled(params):
        encoder = params["encoder"]
        buckets = t5.position_buckets(12, 32, 128)
        bias = encoder["relative_attention_bias"]["embedding"][buckets].transpose(2, 0, 1)[None]
        x = params["shared"]["embedding"][ids]
        for i in range(3):
            layer = jax.tree.map(lambda p, i=i: p[i], encoder["block"])
            x, _ = block.apply({"params": layer}, x, bias, mask)
        return t5.RMSNorm(1e-6).apply({"params": encoder["final_layer_norm"]}, x)

    def scanned(params):
        return module.apply({"params": params}, ids, mask)

    np.testing.assert_allclose(scanned(params), unrolled(params), atol=1e-5)
    ours = jax.grad(lambda p: jnp.sin(scanned(p)).sum())(params)
    theirs = jax.grad(lambda p: jnp.sin(unrolled(p)).sum())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), ours, theirs)
    assert ("remat" in str(jax.make_jaxpr(jax.grad(lambda p: scanned(p).sum()))(params))) == remat


def test_bfloat16_is_close_and_survives_large_weights(model):
    module, params = model
    half = module.clone(dtype=jnp.bfloat16)
    exact = module.apply({"params": params}, tokens())
    rough = half.apply({"params": params}, tokens())
    assert rough.dtype == jnp.float32
    assert 1e-4 < np.abs(rough - exact).max() / np.abs(exact).max() < 0.1
    inflated = jax.tree.map(lambda p: p * 300, params)
    assert np.isfinite(half.apply({"params": inflated}, tokens())).all()


def test_an_id_outside_of_the_vocabulary_does_not_pass_silently(model):
    module, params = model
    assert np.isnan(module.apply({"params": params}, tokens().at[0, 0].set(50))[0]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=jnp.float16), "float16"),
        (dict(feed_forward_proj="gated-gelo"), 'mean "gated-gelu"'),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        t5.T5Encoder(**(TINY | change)).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def test_mask_of_another_shape_is_refused(model):
    module, params = model
    with pytest.raises(ConfigError, match=r"\[2, 12\] and \[2, 11\]"):
        module.apply({"params": params}, tokens(), jnp.ones((2, 11), jnp.int32))


def test_a_new_encoder_tells_the_order_of_its_words():
    """Swapped neighbours change the encoding of a word far from them in a visible way."""
    module = t5.T5Encoder(**{**TINY, "num_heads": 4})
    one, other = jnp.array([[3, 20, 8, 31, 1]]), jnp.array([[31, 20, 8, 3, 1]])
    params = module.init(jax.random.key(0), one)["params"]
    out, swapped = (module.apply({"params": params}, ids)[0, 1] for ids in (one, other))
    assert jnp.linalg.norm(out - swapped) > 0.05 * jnp.linalg.norm(out)

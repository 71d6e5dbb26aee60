"""The DiT on its own: preparation, scan, rematerialisation, precision, bad sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import tree
from cnxs_jax.errors import ConfigError
from cnxs_jax.models import dit, layers
from cnxs_jax.models.dit import PixArt

CONFIG = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 16,
    "cross_attention_dim": 24,
    "caption_channels": 20,
    "use_additional_conditions": True,
}


def inputs(seed=0, batch=2, size=(12, 16), length=5):
    rng = np.random.default_rng(seed)
    cond = {
        "text": rng.normal(size=(batch, length, 20)).astype(np.float32),
        "text_mask": np.array([[1, 1, 0, 0, 0], [1] * 5])[:batch],
        "size": np.full((batch, 2), 64.0, np.float32),
        "aspect": np.ones((batch, 1), np.float32),
    }
    x = rng.normal(size=(batch, *size, 4)).astype(np.float32)
    return x, np.array([3, 907])[:batch], cond


@pytest.fixture(scope="module")
def params():
    init = PixArt(**CONFIG).init(jax.random.key(0), *inputs())["params"]
    leaves, treedef = jax.tree.flatten(init)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def run(params, *args, **changes):
    return PixArt(**{**CONFIG, **changes}).apply({"params": params}, *args)


def test_published_parameter_counts():
    def count(**fields):
        module = PixArt(**fields)
        x = jnp.zeros((1, 16, 16, 4))
        cond = {"text": jnp.zeros((1, 3, 4096)), "size": jnp.ones((1, 2)), "aspect": x[:, 0, 0, :1]}
        shapes = jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(1), cond)
        return tree.size(shapes)

    assert count(sample_size=128) == 611_349_152
    assert count(sample_size=64) == 610_856_096


def test_prepared_text_gives_the_same_and_is_used(params):
    x, t, cond = inputs()
    module = PixArt(**CONFIG)
    ready = module.apply({"params": params}, cond, method="prepare")
    np.testing.assert_array_equal(run(params, x, t, cond), run(params, x, t, ready))
    stale = {**ready, "text": np.zeros_like(cond["text"])}  # read no more once it is prepared
    np.testing.assert_array_equal(run(params, x, t, ready), run(params, x, t, stale))


def test_scan_equals_the_blocks_one_by_one(params):
    x, t, cond = inputs()
    module = PixArt(**CONFIG)
    h, emb, t0 = module.apply({"params": params}, x, t, cond, method="embed")
    text = module.apply({"params": params}, cond, method="prepare")["prepared"]
    block = dit.PixArtBlock(2, 12)
    for i in range(3):
        layer = jax.tree.map(lambda p, i=i: p[i], params["transformer_blocks"])
        kv = jax.tree.map(lambda p, i=i: p[i], text["kv"])
        h, _ = block.apply({"params": layer}, h, kv, t0, text["context"], cond["text_mask"])
    out = module.apply({"params": params}, h, emb, x.shape[1:3], method="final")
    np.testing.assert_allclose(run(params, x, t, cond), out, atol=2e-5)


def test_every_block_counts(params):
    x, t, cond = inputs()
    out = run(params, x, t, cond)
    for i in range(3):
        changed = jax.tree.map(lambda p, i=i: p.at[i].mul(1.1), params["transformer_blocks"])
        other = run({**params, "transformer_blocks": changed}, x, t, cond)
        assert np.abs(out - other).max() > 1e-3


@pytest.mark.parametrize("remat", ["full", "dots_with_no_batch_dims_saveable"])
def test_rematerialisation_changes_nothing(params, remat):
    x, t, cond = inputs()

    def loss(p, remat):
        return jnp.square(run(p, x, t, cond, remat=remat)).mean()

    value, grads = jax.value_and_grad(loss)(params, None)
    value_remat, grads_remat = jax.value_and_grad(loss)(params, remat)
    assert "remat" in str(jax.make_jaxpr(jax.grad(lambda p: loss(p, remat)))(params))
    np.testing.assert_allclose(value, value_remat, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), grads, grads_remat
    )


def test_unrolled_equals_scanned(params, monkeypatch):
    x, t, cond = inputs()
    unrolled = run(params, x, t, cond)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    scanned = run(params, x, t, cond)
    np.testing.assert_allclose(unrolled, scanned, atol=2e-5)


@pytest.mark.parametrize(("backend", "scans"), [("gpu", 1), ("cpu", 0)])
def test_accelerators_scan_the_blocks(params, monkeypatch, backend, scans):
    """One block in the program, or all of them: values do not tell."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    text = jax.jit(lambda p: run(p, *inputs())).lower(params).as_text()
    assert ("stablehlo.while" in text) == bool(scans)


def test_padding_tokens_have_no_influence(params):
    x, t, cond = inputs()
    other = {**cond, "text": cond["text"].copy()}
    other["text"][0, 2:] += 5.0
    np.testing.assert_array_equal(run(params, x, t, cond)[0], run(params, x, t, other)[0])
    assert np.abs(run(params, x, t, cond) - run(params, x, t, {**cond, "text": 2 * cond["text"]})
                  ).max() > 1e-3  # fmt: skip


def test_bfloat16_compute_keeps_timesteps_apart(params):
    x, _, cond = inputs(batch=1)
    embed = layers.sinusoid(jnp.arange(1000), 256)
    assert embed.dtype == jnp.float32
    assert len(np.unique(np.asarray(embed), axis=0)) == 1000
    half = run(params, x, np.array([999]), cond, dtype=jnp.bfloat16)
    full = run(params, x, np.array([999]), cond)
    assert half.dtype == jnp.float32
    assert np.abs(half - full).max() < 0.05 * np.abs(full).max()


def test_dense_is_a_linear_layer_with_its_gradient():
    """The CPU's own gradient rule against autodiff of the plain product."""
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in ((0, (2, 3, 5)), (1, (5, 7))))

    def loss(matmul, x, kernel):
        return jnp.sum(jnp.sin(matmul(x, kernel)))

    ours = jax.grad(loss, (1, 2))(lambda x, k: layers._matmul(x, k, False), x, kernel)
    theirs = jax.grad(loss, (1, 2))(jnp.matmul, x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_odd_latents_and_contradicting_widths_are_refused(params):
    x, t, cond = inputs(size=(11, 16))
    with pytest.raises(ConfigError, match="not divisible by the patch size"):
        run(params, x, t, cond)
    x, t, cond = inputs()
    with pytest.raises(ConfigError, match="cross_attention_dim 32"):
        run(params, x, t, cond, cross_attention_dim=32)

"""AutoencoderKL: properties that need no PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.errors import ConfigError
from cnxs_jax.models import attention as forms
from cnxs_jax.models import vae

TINY = dict(block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4)


@pytest.fixture(scope="module")
def model():
    module = vae.AutoencoderKL(**TINY)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(noise))
    params = jax.tree.map(lambda p, k: p + 0.1 * jax.random.normal(k, p.shape), params, noise)
    return module, params


def decode(module, params, z):
    return jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))(params, z)


def test_blocked_attention_is_direct_attention(model, monkeypatch):
    module, params = model
    z = jax.random.normal(jax.random.key(2), (2, 26, 24, 4))
    with jax.default_matmul_precision("highest"):
        blocked = decode(module, params, z)
        monkeypatch.setattr(vae, "BLOCKED_FROM", 10**9)
        direct = decode(module, params, z)
    assert np.abs(blocked - direct).max() <= 1e-5 * np.abs(direct).max()
    assert not np.array_equal(blocked, direct)  # else both ran the same form


def test_no_logits_of_all_pairs_of_pixels(model):
    module, params = model
    z = jnp.zeros((1, 64, 64, 4))
    program = jax.make_jaxpr(lambda p, z: module.apply({"params": p}, z, method="decode"))
    assert "4096,4096" not in str(program(params, z))
    assert f"{forms.LOGITS // 4096},4096" in str(program(params, z))


def test_images_of_a_batch_do_not_mix(model):
    module, params = model
    z = jax.random.normal(jax.random.key(3), (2, 6, 10, 4))
    together = decode(module, params, z)
    alone = decode(module, params, z[1:])
    assert together.shape == (2, 12, 20, 3)
    np.testing.assert_allclose(together[1:], alone, atol=1e-5)


def test_a_sample_of_the_posterior_has_its_mean_and_variance(model):
    module, params = model
    x = jax.random.uniform(jax.random.key(4), (1, 16, 16, 3), minval=-1.0)
    mean, logvar = module.apply({"params": params}, x, method="encode")
    np.testing.assert_array_equal(module.apply({"params": params}, x)[1], mean)
    sampled, again, other = (
        module.apply({"params": params}, x, jax.random.key(seed))[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(sampled, again)
    assert np.abs(sampled - other).max() > 1e-3
    certain = {
        **params,
        "quant_conv": {k: v.at[..., 4:].set(0) for k, v in params["quant_conv"].items()},
    }
    certain["quant_conv"]["bias"] = certain["quant_conv"]["bias"].at[4:].set(-100.0)
    images, _, logvar = module.apply({"params": certain}, x, jax.random.key(0))
    assert float(logvar.max()) == float(logvar.min()) == -30.0
    np.testing.assert_allclose(images, module.apply({"params": certain}, x)[0], atol=1e-4)


def test_bfloat16_is_close_and_returns_float32(model):
    module, params = model
    z = jax.random.normal(jax.random.key(5), (1, 8, 8, 4))
    exact, rough = decode(module, params, z), decode(module.clone(dtype=jnp.bfloat16), params, z)
    assert rough.dtype == jnp.float32
    assert 1e-4 < np.abs(rough - exact).max() / np.abs(exact).max() < 0.05


@pytest.mark.parametrize(
    "change", [dict(dtype=jnp.float16), dict(norm_num_groups=3), dict(act_fn="relu")]
)
def test_bad_configs_are_refused(change):
    with pytest.raises(ConfigError):
        vae.AutoencoderKL(**(TINY | change)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_wrong_channels_are_refused(model):
    module, params = model
    with pytest.raises(ConfigError, match=r"\[B,H,W,4\], got \[1, 8, 8, 3\]"):
        module.apply({"params": params}, jnp.zeros((1, 8, 8, 3)), method="decode")

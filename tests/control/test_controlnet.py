"""ControlNet beside ControlNet-XS: a fresh copy changes nothing, what it adds, what it refuses."""

import jax
import numpy as np
import pytest

from cnxs_jax import control, tree
from cnxs_jax.control import controlnet
from cnxs_jax.convert import families, unet
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.unet import UNet
from tests.control.unets import BASE, BATCH, HINT_WIDTHS, base_params, inputs, perturbed, run

ADAPTER = controlnet.from_unet(BASE, **HINT_WIDTHS)


@pytest.fixture(scope="module")
def base():
    return base_params()


@pytest.fixture(scope="module")
def fresh(base):
    return controlnet.copied_params(ADAPTER, base, jax.random.key(1))


def test_a_fresh_copy_is_the_base_bit_for_bit(base, fresh):
    module, params = control.attach(BASE, base, ADAPTER, fresh)
    args = inputs()
    np.testing.assert_array_equal(run(module, params, *args), run(BASE, base, *args))


def test_fresh_parameters_are_those_of_init(base, fresh):
    module, params = control.attach(BASE, base, ADAPTER, fresh)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs())["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)


def test_the_base_encoder_stays_and_scales_act_on_their_image_alone(base, fresh):
    """A scale of 0 is the base; connections are the skips and the middle."""
    module, params = control.attach(BASE, base, ADAPTER, perturbed(fresh))
    x, t, cond = inputs()
    plain = run(BASE, base, x, t, cond)
    out = run(module, params, x, t, {**cond, "control_scale": np.array([0, 1], "f4")})
    np.testing.assert_allclose(out[0], plain[0], rtol=0, atol=1e-5)
    assert np.abs(out[1] - plain[1]).max() > 1e-2
    n = BASE.num_stages
    for c in range(2 * n + 1):
        scales = np.zeros((BATCH, 2 * n + 1), np.float32)
        scales[:, c] = 1.0
        alone = run(module, params, x, t, {**cond, "connection_scale": scales})
        assert (np.abs(alone - plain).max() > 1e-4) == (c <= n), c


def test_published_size():
    """361.3 million parameters to train on SD 1.5, seven times ControlNet-XS."""
    base = UNet(**unet.PUBLISHED["sd15"])
    adapter = controlnet.from_unet(base)
    family = families.family_of_module(adapter)
    shapes = jax.eval_shape(adapter.init, jax.random.key(0), *family.example(adapter))["params"]
    assert tree.size(shapes) == 361_279_120


@pytest.mark.parametrize(
    ("adapter", "compat", "words"),
    [
        (ADAPTER, "diffusers", "only 'official'"),
        (ADAPTER.clone(cross_attention_dim=9), "official", "cross_attention_dim 9, of the base 12"),
        (ADAPTER.clone(attention_head_dim=(2, 4)), "official", "attention_head_dim"),
    ],
)
def test_misfits(adapter, compat, words):
    with pytest.raises(ConfigError, match=words):
        control.attach(BASE, {}, adapter, {}, compat)


def test_unknown_channel_order(base, fresh):
    adapter = ADAPTER.clone(controlnet_conditioning_channel_order="grb")
    module, params = control.attach(BASE, base, adapter, fresh)
    with pytest.raises(ConfigError, match="only rgb and bgr"):
        jax.eval_shape(module.apply, {"params": params}, *inputs())

"""AutoencoderKL against diffusers, float32, every parameter perturbed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE

from cnxs_jax import tree
from cnxs_jax.models.vae import AutoencoderKL
from tests.parity.helpers import convert, nhwc, perturb, relative_error

pytestmark = pytest.mark.parity

CONFIGS = {
    "three_levels": dict(
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, norm_num_groups=8
    ),
    "two_layers_no_attention": dict(
        block_out_channels=(16, 32),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ),
    "no_quant_conv": dict(
        block_out_channels=(16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}


def pair(name):
    """(PyTorch model, module, converted parameters) of one config."""
    config = CONFIGS[name]
    levels = len(config["block_out_channels"])
    torch.manual_seed(0)
    theirs = TorchVAE(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **config,
    )
    perturb(theirs)
    return theirs, AutoencoderKL(**config), convert(theirs.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(32, 32), (112, 96), (37, 50)])
def test_encode(name, size):
    theirs, module, params = pair(name)
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = theirs.encode(x).latent_dist
        mean, logvar = module.apply({"params": params}, nhwc(x), method="encode")
    assert relative_error(mean, nhwc(expected.mean)) <= 1e-5
    assert relative_error(logvar, nhwc(expected.logvar)) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(8, 8), (24, 28)])
def test_decode(name, size):
    theirs, module, params = pair(name)
    channels = module.latent_channels
    z = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = nhwc(theirs.decode(z).sample)
        image = module.apply({"params": params}, nhwc(z), method="decode")
    f = module.downsample_factor
    assert image.shape == (2, f * size[0], f * size[1], 3)
    assert relative_error(image, expected) <= 1e-5


def test_every_parameter_is_named_as_in_diffusers():
    _, module, params = pair("three_levels")
    ours = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    shapes = {k: v.shape for k, v in tree.flatten(ours).items()}
    assert shapes == {k: v.shape for k, v in tree.flatten(params).items()}


def test_gradients_of_the_reconstruction():
    theirs, module, params = pair("three_levels")
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    target = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(4))
    loss = (theirs.decode(theirs.encode(x).latent_dist.mean).sample - target).square().mean()
    loss.backward()
    expected = convert({k: p.grad for k, p in theirs.named_parameters()})

    def ours(params):
        image, _, _ = module.apply({"params": params}, nhwc(x))
        return jnp.square(image - nhwc(target)).mean()

    with jax.default_matmul_precision("highest"):
        value, grads = jax.jit(jax.value_and_grad(ours))(params)
    assert abs(float(value) / loss.item() - 1) <= 1e-5
    grads, expected = tree.flatten(grads), tree.flatten(expected)
    largest = max(np.abs(g).max() for g in expected.values())
    assert grads.keys() == expected.keys()
    for name, g in expected.items():
        assert np.abs(grads[name] - g).max() <= 1e-4 * max(np.abs(g).max(), 1e-3 * largest), name

"""Tiled decoding against diffusers' `enable_tiling`, float32."""

import jax
import pytest
import torch

from cnxs_jax.models import tiling
from tests.parity.helpers import nhwc, relative_error
from tests.parity.test_vae import pair

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("size", [(16, 16), (9, 22), (20, 8)])
def test_tiles_are_diffusers_tiles(size):
    theirs, module, params = pair("three_levels")
    tile = 8
    theirs.enable_tiling()
    theirs.tile_latent_min_size = tile
    theirs.tile_sample_min_size = tile * module.downsample_factor
    z = torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(3))

    def decode(part):
        return module.apply({"params": params}, part, method="decode")

    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = nhwc(theirs.decode(z).sample)
        found = jax.jit(lambda z: tiling.decode(decode, z, module.downsample_factor, tile))(nhwc(z))
    assert relative_error(found, expected) <= 1e-5

"""Tiled decoding: seams, edges, and that small latents are decoded whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.models import tiling
from cnxs_jax.models.vae import AutoencoderKL
from cnxs_jax.pipelines import programs
from tests.pipelines.tiny import perturbed


def enlarge(z):
    """A decoder without a field of view: every latent becomes 2x2 pixels."""
    return jnp.repeat(jnp.repeat(z, 2, axis=1), 2, axis=2)


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (20, 13), (16, 40)])
def test_tiles_of_a_pointwise_decoder_are_the_whole(size):
    """Blending two equal pictures changes nothing, wherever the seams are."""
    z = jax.random.normal(jax.random.key(0), (2, *size, 3))
    out = tiling.decode(enlarge, z, 2, tile=8)
    np.testing.assert_allclose(out, enlarge(z), atol=1e-6)


def test_small_latents_are_decoded_at_once():
    calls = []
    tiling.decode(lambda z: calls.append(z.shape) or enlarge(z), jnp.zeros((1, 8, 8, 3)), 2, tile=8)
    assert calls == [(1, 8, 8, 3)]


def test_neighbours_fade_into_each_other():
    """Two tiles that disagree: a ramp over a quarter of a tile, never a step."""
    steps = jnp.concatenate([jnp.zeros((1, 4, 6, 1)), jnp.ones((1, 4, 6, 1))], axis=2)
    rows = [jnp.full((1, 4, 16, 1), 0.0), jnp.full((1, 4, 12, 1), 1.0)]
    line = tiling.blend(rows[0], rows[1], 4, axis=2)[0, 0, :, 0]
    np.testing.assert_allclose(line[:5], [0.0, 0.25, 0.5, 0.75, 1.0])
    out = tiling.decode(enlarge, steps, 2, tile=8)
    assert out.shape == (1, 8, 24, 1)


def test_the_pipeline_decodes_in_tiles():
    """Group norms see one tile each, so the tiled picture is near the whole one, not equal."""
    vae = AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    params = perturbed(vae, jnp.zeros((1, 16, 16, 3)))
    z = jax.random.normal(jax.random.key(1), (1, 12, 20, 4)) * vae.scaling_factor
    whole = programs.decode(vae, params, z, (24, 40))
    large = programs.decode(vae, params, z, (24, 40), tile=20)
    tiled = programs.decode(vae, params, z, (24, 40), tile=8)
    np.testing.assert_array_equal(large, whole)
    assert tiled.shape == whole.shape
    spread = float(jnp.std(whole))
    assert 1e-4 * spread < float(jnp.sqrt(jnp.mean(jnp.square(tiled - whole)))) < 0.5 * spread

"""A tiny UNet, inputs and perturbed parameters, for the tests of its controllers."""

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import tree
from cnxs_jax.models.unet import UNet

BATCH, TEXT, FACTOR, SIZE = 2, 12, 2, (3, 5)
BASE = UNet(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=TEXT,
    attention_head_dim=2,
)
HINT_WIDTHS = {"conditioning_embedding_out_channels": (4, 6)}  # two pixels a latent


def inputs(seed=0):
    """(x, t, cond) with a hint and all factors 1, at a size that does not halve evenly."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, *SIZE, 4)).astype(np.float32)
    hint = rng.uniform(size=(BATCH, *(FACTOR * n for n in SIZE), 3)).astype(np.float32)
    cond = {
        "text": rng.normal(size=(BATCH, 5, TEXT)).astype(np.float32),
        "hint": hint,
        "control_scale": np.ones(BATCH, np.float32),
        "connection_scale": np.ones((BATCH, 2 * BASE.num_stages + 1), np.float32),
    }
    return jnp.asarray(x), jnp.array([3, 700]), cond


def perturbed(params, seed=0, keep=()):
    """Noise on every leaf but those that `keep` matches, so that no part is silent."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if tree.matches(keep, path):
            return leaf
        if path.endswith("kernel"):
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.asarray(leaf) + np.float32(0.1) * noise

    return tree.map_with_path(draw, params)


def base_params():
    """Perturbed parameters of `BASE`."""
    shapes = jax.eval_shape(BASE.init, jax.random.key(0), *inputs())["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return perturbed(zeros)


apply = jax.jit(
    lambda module, params, *args: module.apply({"params": params}, *args), static_argnums=0
)


def run(module, params, *args):
    """The denoiser's output."""
    return np.asarray(apply(module, params, *args))

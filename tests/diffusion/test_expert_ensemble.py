"""An ensemble of real networks in the sampling loop: same pictures, same cost, no copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.diffusion import edm, expert_tree, guidance, sampling, schedule, solvers
from cnxs_jax.models.pixel_unet import PixelUNet
from eval import flops

NETWORK = PixelUNet(
    block_out_channels=(16, 32),
    layers_per_block=(1, 1),
    self_attention=(False, True),
    cross_attention=(False, True),
    attention_head_dim=16,
    cross_attention_dim=16,
    text_dim=8,
    norm_num_groups=4,
)
DENOISE = guidance.cfg(edm.precondition(sampling.denoiser(NETWORK)))
B, EXPERTS = 2, expert_tree.cover([(3, 0), (9, 511)])
X = jax.random.normal(jax.random.key(0), (B, 16, 16, 3))
TEXT = jax.random.normal(jax.random.key(1), (B, 3, 8))
COND = {
    "text": TEXT,
    "text_mask": jnp.ones((B, 3)),
    "guidance_scale": jnp.full(B, 3.0),
    "null": {"text_mask": jnp.zeros((B, 3))},
}
TABLE = solvers.deis(schedule.edm(), 25, order=3)
ROUTED = expert_tree.route(TABLE, EXPERTS, expert_tree.LogNormal())


def noisy_params(seed):
    inner = {k: COND[k] for k in ("text", "text_mask")}
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0), X, jnp.zeros(B), inner)["params"]
    rng = np.random.default_rng(seed)

    def draw(s):
        return jnp.asarray(0.2 * rng.normal(size=s.shape), jnp.float32)

    return jax.tree.map(draw, shapes)


def compiled(params, table):
    post = guidance.dynamic_threshold()

    def run(params, table):
        return sampling.sample(DENOISE, params, X, COND, table, post=post)

    return jax.jit(run).lower(params, table).compile()


@pytest.fixture(scope="module")
def parent():
    return noisy_params(0)


def test_copies_are_the_single_model_at_its_cost_and_without_a_copy_of_an_expert(parent):
    copies = tuple(jax.tree.map(jnp.array, parent) for _ in EXPERTS)
    single, routed = compiled(parent, TABLE), compiled(copies, ROUTED)
    want = np.asarray(single(parent, TABLE))
    np.testing.assert_array_equal(routed(copies, ROUTED), want)
    others = (*copies[:2], noisy_params(1))  # of the highest noise
    assert np.abs(np.asarray(routed(others, ROUTED)) - want).max() > 1e-2

    assert flops.count(routed) == pytest.approx(flops.count(single), rel=0.01)
    size = sum(p.nbytes for p in jax.tree.leaves(parent))
    extra = (
        routed.memory_analysis().temp_size_in_bytes - single.memory_analysis().temp_size_in_bytes
    )
    print(f"FLOPs {flops.count(routed) / flops.count(single):.4f}, temp +{extra} of {size} bytes")
    assert extra < size

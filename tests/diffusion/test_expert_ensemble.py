"""An ensemble of real networks in the sampling loop: same pictures, same cost, no copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.diffusion import edm, expert_tree, guidance, sampling, schedule, solvers
from cnxs_jax.models.dit import PixArt
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


def test_the_same_routing_on_a_transformer_with_consistency_rows():
    """PixArt in four LCM steps: three experts own them, at the cost of one model."""
    dit = PixArt(
        num_layers=2, num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48,
        caption_channels=20, sample_size=8, out_channels=4,
    )  # fmt: skip
    # Every expert reads the text once: next to nothing where the pictures are large.
    x = jax.random.normal(jax.random.key(2), (B, 16, 16, 4))
    cond = {"text": jax.random.normal(jax.random.key(3), (B, 5, 20)), "text_mask": jnp.ones((B, 5))}
    shapes = jax.eval_shape(dit.init, jax.random.key(0), x, jnp.zeros(B), cond)["params"]

    def draw(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda s: jnp.asarray(0.1 * rng.normal(size=s.shape), jnp.float32), shapes
        )

    table = solvers.lcm(schedule.linear(), 4)
    times = expert_tree.Times(1000)
    split = expert_tree.route(table, expert_tree.cover([(2, 0), (1, 1)]), times)
    assert split.expert == (2, 2, 1, 1)  # 999, 759 | 499, 259; none below 250
    three = expert_tree.route(table, expert_tree.equal(3), times)
    assert three.expert == (2, 2, 1, 0)
    denoise = sampling.denoiser(dit)

    def program(params, table):
        def run(params, table):
            return sampling.sample(denoise, params, x, cond, table, key=jax.random.key(5))

        return jax.jit(run).lower(params, table).compile()

    parent = draw(0)
    copies = tuple(jax.tree.map(jnp.array, parent) for _ in range(3))
    single, routed = program(parent, table), program(copies, three)
    want = np.asarray(single(parent, table))
    np.testing.assert_array_equal(routed(copies, three), want)
    other = (*copies[:2], draw(1))
    assert np.abs(np.asarray(routed(other, three)) - want).max() > 1e-2
    assert flops.count(routed) == pytest.approx(flops.count(single), rel=0.01)

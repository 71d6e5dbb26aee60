"""An ensemble of real networks in the sampling loop: same pictures, same cost, no copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import control
from cnxs_jax.control import controlnet_xs
from cnxs_jax.diffusion import edm, expert_tree, guidance, sampling, schedule, solvers
from cnxs_jax.models.dit import PixArt
from cnxs_jax.models.pixel_unet import PixelUNet
from cnxs_jax.models.unet import UNet
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


def test_the_same_routing_on_a_stable_diffusion_with_control():
    """ControlNet-XS on each expert, its hint read once each; an expert may go without."""
    unet = UNet(
        block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=2, sample_size=8,
    )  # fmt: skip
    adapter = controlnet_xs.from_unet(
        unet, block_out_channels=(4, 6), conditioning_embedding_out_channels=(4, 6),
        num_attention_heads=2,
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(2), (B, 16, 16, 4))
    text = jax.random.normal(jax.random.key(3), (B, 5, 12))
    hint = jax.random.uniform(jax.random.key(4), (B, 32, 32, 3))
    shapes = jax.eval_shape(unet.init, jax.random.key(0), x, jnp.zeros(B), {"text": text})["params"]
    adapter_shapes = jax.eval_shape(adapter.init, jax.random.key(0), x, hint, text)["params"]

    def draw(seed):
        rng = np.random.default_rng(seed)
        trees = {"base": shapes, "control": adapter_shapes}
        return jax.tree.map(
            lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), jnp.float32), trees
        )

    whole = draw(0)
    module, parent = control.attach(unet, whole["base"], adapter, whole["control"])
    _, other = control.attach(unet, draw(1)["base"], adapter, draw(1)["control"])
    denoise = guidance.cfg(sampling.denoiser(module))
    cond = {"text": text, "hint": hint, "guidance_scale": jnp.full(B, 3.0)}
    cond["null"] = {"text": jnp.zeros_like(text)}
    table = solvers.dpmpp(schedule.scaled_linear(), 12)
    routed = expert_tree.route(table, expert_tree.equal(3), expert_tree.Times(1000))
    assert sorted(set(routed.expert)) == [0, 1, 2]

    def program(denoise, params, cond, table):
        def run(params, table):
            return sampling.sample(denoise, params, x, cond, table)

        return jax.jit(run).lower(params, table).compile()

    copies = tuple(jax.tree.map(jnp.array, parent) for _ in range(3))
    single, several = program(denoise, parent, cond, table), program(denoise, copies, cond, routed)
    want = np.asarray(single(parent, table))
    np.testing.assert_array_equal(several(copies, routed), want)
    assert np.abs(np.asarray(several((*copies[:2], other), routed)) - want).max() > 1e-2
    assert flops.count(several) == pytest.approx(flops.count(single), rel=0.01)

    base = guidance.cfg(sampling.denoiser(unet))
    plain = {k: v for k, v in cond.items() if k != "hint"}
    free = program((base, denoise, denoise), (whole["base"], parent, parent),
                   (plain, cond, cond), routed)  # fmt: skip
    found = np.asarray(free((whole["base"], parent, parent), routed))
    ends = routed.expert.index(0) / 12
    ended = table.with_control(0.0, ends)
    np.testing.assert_allclose(found, single(parent, ended), atol=2e-5 * np.abs(want).max())
    assert np.abs(found - want).max() > 1e-3

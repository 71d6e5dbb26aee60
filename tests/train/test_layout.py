"""The head that tells what stands where: what it counts, and that the words' places are learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnxs_jax import tree
from cnxs_jax.data import shapes
from cnxs_jax.data.scenes import make_scene
from cnxs_jax.models.dit import PixArt
from cnxs_jax.models.unet import UNet
from tests.pipelines import tiny
from train import layout, tasks

DIT = PixArt(
    num_layers=3, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
    caption_channels=8, in_channels=4, out_channels=4, patch_size=2, sample_size=8,
)  # fmt: skip


def test_the_map_of_concepts_becomes_shares_of_patches():
    world = shapes.world()
    scene = make_scene(world, 3, {"count": 2}, size=32)
    shares = layout.coverage(scene["concept_map"][None], (4, 4), len(world.concepts))[0]
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)
    for mask, thing in zip(scene["masks"], scene["objects"], strict=True):
        per_patch = mask.reshape(4, 8, 4, 8).mean((1, 3)).reshape(-1)
        told = shares[:, 1 + world.concepts.index(thing["concept"])]
        np.testing.assert_allclose(told, per_patch, atol=1e-6)


def test_only_the_right_place_has_no_loss():
    shares = np.zeros((2, 4, 3), np.float32)
    shares[0, :, 1], shares[1, :2, 2], shares[1, 2:, 0] = 1, 1, 1
    shares[1, 3] = (0.5, 0.5, 0)  # the least of a shared patch is its entropy, which does not count
    head = 30 * np.eye(3, dtype=np.float32)
    told = np.where(shares == 1, 1.0, np.where(shares == 0, -1.0, 0.2))
    np.testing.assert_allclose(layout.loss(head, told, shares), 0, atol=1e-4)
    assert layout.loss(head, told[::-1], shares).min() > 10


def test_the_head_stands_beside_given_and_drawn_parameters():
    given = layout.with_head({"transformer": 1}, 32, 5)
    drawn = layout.with_head(lambda key: {"transformer": 2}, 32, 5)(jax.random.key(0))
    assert (given["transformer"], drawn["transformer"]) == (1, 2)
    for params in (given, drawn):
        assert params[layout.NAME].shape == (32, 6)
        assert 0.8 < np.std(params[layout.NAME]) * 32**0.5 < 1.2


def test_a_network_learns_from_the_head_alone_where_a_word_belongs():
    """ "1 2": 1 on the left, 2 on the right; the pictures are pure noise, so only the text can say.

    With the head's loss alone the tokens of unseen noise name the right concept on each side.
    """
    rng = np.random.default_rng(0)
    params = {"transformer": jax.jit(DIT.init)(
        jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), {"text": jnp.zeros((1, 2, 8))}
    )["params"]}  # fmt: skip
    params = layout.with_head(params, DIT.features, 2)
    run = tasks.with_losses(DIT, {"layout": 1.0})
    words, places = rng.normal(size=(2, 8)), rng.normal(size=(2, 8))

    def batch(size):
        first = rng.integers(0, 2, size)
        text = np.stack([words[first], words[1 - first]], 1) + places
        grid = np.repeat(np.stack([first, 1 - first], 1)[:, None], 4, 1).repeat(2, 2)
        cond = {"text": text, "coverage": np.eye(3)[1 + grid.reshape(size, 16)]}
        return rng.normal(size=(size, 8, 8, 4)), np.full(size, 999.0), cond, grid.reshape(size, 16)

    tx = optax.adam(3e-3)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, t, cond):
        grads = jax.grad(lambda p: run(p, x, t, cond)[1]["layout"].mean())(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    for _ in range(150):
        params, state = step(params, state, *batch(32)[:3])
    x, t, cond, where = batch(64)
    out, tokens = jax.jit(layout.tapped(DIT))(params["transformer"], x, t, cond)
    told = (layout.layer_norm(tokens) @ params["layout"]).argmax(-1)
    assert np.mean(told == 1 + where) > 0.95
    alone = jax.jit(DIT.apply)({"params": params["transformer"]}, x, t, cond)
    np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-6)


def test_the_features_of_a_unet_are_read_where_the_text_has_been_heard():
    """Its output is the plain one; the last level alone comes after what the head reads."""
    unet = UNet(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    x, text = rng.normal(size=(1, 8, 8, 4)), rng.normal(size=(2, 1, 3, 8))
    args = x, jnp.full(1, 700), {"text": text[0]}
    params = tiny.perturbed(unet, *args)
    run = jax.jit(layout.tapped_unet(unet))
    out, tokens = run(params, *args)
    plain = jax.jit(unet.apply)({"params": params}, *args)
    np.testing.assert_allclose(out, plain, rtol=1e-4, atol=1e-5)
    other = run(params, x, args[1], {"text": text[1]})[1]
    assert np.abs(other - tokens).max() > 1e-3
    late = r"(up_blocks_1/resnets_1|conv_norm_out|conv_out)/.*"
    moved = tree.map_with_path(
        lambda path, leaf: leaf + 1 if tree.matches((late,), path) else leaf, params
    )
    out_moved, tokens_moved = run(moved, *args)
    np.testing.assert_array_equal(tokens_moved, tokens)
    assert np.abs(out_moved - out).max() > 0.1

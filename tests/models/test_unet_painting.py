"""Paint-with-words in the UNet: nothing painted is no painting, a mask draws attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.models.painting import paint_at
from cnxs_jax.models.unet import UNet
from cnxs_jax.models.unet_blocks import CrossAttention
from tests.pipelines.tiny import perturbed

TINY = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=12,
    attention_head_dim=2,
)
B, SIZE, L = 2, (8, 6), 5
LEFT = np.zeros((B, *SIZE, L), np.float32)
LEFT[:, :, :3, 1] = 1.0
TOKENS = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]], np.int32)
X = np.random.default_rng(0).normal(size=(B, *SIZE, 4)).astype(np.float32)
T = np.array([300.0, 800.0], np.float32)


def condition(mask=None, weight=0.5, sigma=5.0):
    # With a mask of ones the plain program adds a bias, too: without it the compiler contracts
    # scaling and subtraction into one rounding, and "to the bit" would be to the last bit but one.
    cond = {"text": np.random.default_rng(1).normal(size=(B, L, 12)).astype(np.float32)}
    cond["text_mask"] = np.ones((B, L), np.int32)
    if mask is None:
        return cond
    words = {"word_mask": mask, "word_tokens": TOKENS}
    return (
        cond | words | {"word_weight": np.full(B, weight, "f4"), "sigma": np.full(B, sigma, "f4")}
    )


@pytest.fixture(scope="module")
def run():
    unet = UNet(**TINY)
    params = perturbed(unet, X, T, condition())
    step = jax.jit(lambda x, t, cond: unet.apply({"params": params}, x, t, cond))
    return lambda cond, rows=slice(None): np.asarray(step(X[rows], T[rows], cond))


def test_nothing_painted_is_the_plain_network_to_the_bit(run):
    plain = run(condition())
    for cond in (condition(0 * LEFT), condition(LEFT, weight=0.0), condition(LEFT, sigma=0.0)):
        np.testing.assert_array_equal(run(cond), plain)
    assert np.abs(run(condition(LEFT)) - plain).max() > 1e-3


def test_a_painted_picture_does_not_depend_on_its_batch(run):
    cond = condition(LEFT)
    whole = run(cond)
    for i in range(B):
        rows = slice(i, i + 1)
        alone = run(jax.tree.map(lambda a, rows=rows: a[rows], cond), rows)
        np.testing.assert_allclose(alone[0], whole[i], rtol=1e-4, atol=1e-5)


def test_attention_moves_to_the_painted_word_where_it_is_painted():
    """Values that are one-hot make the layer's output the attention weights themselves."""
    layer, eye = CrossAttention(num_heads=1, head_dim=L), np.eye(L, dtype=np.float32)
    params = {name: {"kernel": eye} for name in ("to_q", "to_k", "to_v", "to_out_0")}
    params["to_out_0"]["bias"] = np.zeros(L, np.float32)
    h = np.random.default_rng(2).normal(size=(B, SIZE[0] * SIZE[1], L)).astype(np.float32)
    k = np.random.default_rng(3).normal(size=(B, L, 1, L)).astype(np.float32)
    v = np.broadcast_to(eye[:, None], (B, L, 1, L))

    def weights(paint):
        out = layer.apply({"params": params}, jnp.asarray(h), (jnp.asarray(k), v), None, paint)
        return np.asarray(out).reshape(B, *SIZE, L)

    plain = weights(None)
    painted = weights(paint_at(condition(LEFT, weight=1.0), SIZE, L))
    np.testing.assert_allclose(painted.sum(-1), 1.0, atol=1e-5)
    assert np.all(painted[:, :, :3, 1] > plain[:, :, :3, 1])
    assert painted[:, :, :3, 1].mean() > 0.8 > 0.4 > plain[:, :, :3, 1].mean()
    np.testing.assert_array_equal(painted[:, :, 3:], plain[:, :, 3:])

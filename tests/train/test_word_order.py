"""The heads that predict a token's neighbours: what they count, and that an encoder learns it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnxs_jax.diffusion import schedule
from cnxs_jax.models.dit import PixArt
from cnxs_jax.models.t5 import T5Encoder
from train import objectives, parts, tasks, word_order

TEXT = T5Encoder(vocab_size=12, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
DIT = PixArt(
    num_layers=1, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
    caption_channels=32, in_channels=4, out_channels=4, patch_size=2, sample_size=4,
)  # fmt: skip


def test_an_encoding_that_names_its_neighbours_has_no_loss_and_others_have():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 12, (3, 9))
    mask = np.ones((3, 9), np.int32)
    mask[1, 5:] = 0
    table = np.zeros((3, 9, 6, 12), np.float32)  # one-hot of each neighbour of each position
    for b, i, o in np.ndindex(3, 9, 6):
        j = i + word_order.OFFSETS[o]
        if 0 <= j < 9:
            table[b, i, o, ids[b, j]] = 30.0
    heads = np.zeros((6, 72, 12), np.float32)
    for o in range(6):
        heads[o, 12 * o : 12 * (o + 1)] = np.eye(12)
    text = table.reshape(3, 9, 72)
    assert word_order.loss(heads, text, ids, mask).max() < 1e-6
    hidden = np.where(mask[..., None] > 0, text, 5.0)  # what padding says does not count
    assert word_order.loss(heads, hidden, ids, mask).max() < 1e-6
    assert word_order.loss(heads, np.roll(text, 1, axis=1), ids, mask).min() > 5
    np.testing.assert_allclose(word_order.loss(heads, 0 * text, ids, mask), np.log(12), rtol=1e-6)


def test_a_term_of_the_denoising_loss_is_the_mean_over_captions_however_often_they_are_noised():
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(2, 12, (4, 5)), np.tri(4, 5, 1, np.int32)
    x = rng.normal(size=(4, 4, 4, 4)).astype(np.float32)
    text_params = TEXT.init(jax.random.key(0), ids)["params"]
    text = TEXT.apply({"params": text_params}, ids, mask)
    dit = DIT.init(jax.random.key(1), x, jnp.zeros(4), {"text": text})["params"]
    params = word_order.with_heads({"text_encoder": text_params, "transformer": dit}, TEXT)
    wanted = np.mean(word_order.loss(params[word_order.NAME], text, ids, mask))
    batch = {"x": x, "cond": {"input_ids": ids, "attention_mask": mask}}
    terms = {"word_order": 0.5}
    run = parts.with_text_encoder(
        tasks.with_losses(DIT, terms), functools.partial(parts.t5_text, TEXT)
    )
    objective = jax.jit(objectives.denoise(run, schedule.linear(), noises=3, terms=terms))
    loss, metrics = objective(params, None, {}, batch, jax.random.key(2))
    np.testing.assert_allclose(metrics["word_order"], wanted, rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["mse"] + 0.5 * wanted, rtol=1e-5)


def test_the_encoder_learns_what_stands_on_either_side():
    """Afterwards it names the neighbours of words in captions that it never saw."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(2, 12, (300, 64, 4)), np.ones((64, 4), np.int32)
    init = word_order.with_heads(
        lambda key: {"text_encoder": TEXT.init(key, ids[0])["params"]}, TEXT
    )
    params, tx = init(jax.random.key(0)), optax.adam(3e-3)
    state = tx.init(params)

    def loss(params, ids, mask):
        text = TEXT.apply({"params": params["text_encoder"]}, ids, mask)
        return word_order.loss(params[word_order.NAME], text, ids, mask).mean()

    @jax.jit
    def step(params, state, ids):
        updates, state = tx.update(jax.grad(loss)(params, ids, mask), state)
        return optax.apply_updates(params, updates), state

    for batch in ids:
        params, state = step(params, state, batch)
    ids = rng.integers(2, 12, (100, 4))
    text = TEXT.apply({"params": params["text_encoder"]}, jnp.asarray(ids))
    told = jnp.einsum("bld,odv->bolv", text, params[word_order.NAME]).argmax(-1)
    before, after = (list(word_order.OFFSETS).index(o) for o in (-1, 1))
    assert np.mean(told[:, after, :-1] == ids[:, 1:]) > 0.9
    assert np.mean(told[:, before, 1:] == ids[:, :-1]) > 0.9

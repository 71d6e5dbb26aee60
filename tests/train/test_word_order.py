"""The heads that predict a token's neighbours: what they count, and that an encoder learns it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnxs_jax.models.t5 import T5Encoder
from train import word_order

TEXT = T5Encoder(vocab_size=12, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)


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
    assert word_order.loss(heads, text, ids, mask) < 1e-6
    hidden = np.where(mask[..., None] > 0, text, 5.0)  # what padding says does not count
    assert word_order.loss(heads, hidden, ids, mask) < 1e-6
    assert word_order.loss(heads, np.roll(text, 1, axis=1), ids, mask) > 5
    np.testing.assert_allclose(word_order.loss(heads, 0 * text, ids, mask), np.log(12), rtol=1e-6)


def test_the_encoder_learns_what_stands_on_either_side():
    """Afterwards it names the neighbours of words in captions that it never saw."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(2, 12, (300, 64, 4)), np.ones((64, 4), np.int32)
    init = word_order.with_heads(
        lambda key: {"text_encoder": TEXT.init(key, ids[0])["params"]}, TEXT
    )
    objective = word_order.with_loss(
        lambda *_: (0.0, {}), TEXT, lambda params, frozen: params, weight=1.0
    )
    params, tx = init(jax.random.key(0)), optax.adam(3e-3)
    state = tx.init(params)

    @jax.jit
    def step(params, state, ids):
        batch = {"cond": {"input_ids": ids, "attention_mask": mask}}
        grads = jax.grad(lambda p: objective(p, None, {}, batch, None)[0])(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    for batch in ids:
        params, state = step(params, state, batch)
    ids = rng.integers(2, 12, (100, 4))
    text = TEXT.apply({"params": params["text_encoder"]}, jnp.asarray(ids))
    told = jnp.einsum("bld,odv->bolv", text, params[word_order.NAME]).argmax(-1)
    before, after = (list(word_order.OFFSETS).index(o) for o in (-1, 1))
    assert np.mean(told[:, after, :-1] == ids[:, 1:]) > 0.9
    assert np.mean(told[:, before, 1:] == ids[:, :-1]) > 0.9

"""Pseudo-words: what stands for a word does exactly what the word does."""

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.models.style_words import StyleWords, placeholders, with_words
from cnxs_jax.models.t5 import T5Encoder
from tests.pipelines import tiny

T5 = T5Encoder(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
IDS = jnp.array([[4, 9, 7, 5, 1, 0], [8, 6, 1, 0, 0, 0]], jnp.int32)
MASK = jnp.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], jnp.int32)


def test_embeddings_of_words_in_their_places_are_the_words():
    params = tiny.perturbed(T5, IDS, MASK)
    table = params["shared"]["embedding"]
    words = jnp.stack([table[jnp.array([9, 7])], table[jnp.array([6, 2])]])
    ids = IDS.at[0, 1:3].set(placeholders(2)).at[1, 1].set(-1)
    named = T5.apply({"params": params}, IDS, MASK)
    np.testing.assert_array_equal(T5.apply({"params": params}, ids, MASK, words), named)
    other = T5.apply({"params": params}, ids, MASK, words[::-1])
    assert np.abs(other - named)[np.asarray(MASK, bool)].max() > 1e-2


def test_other_places_keep_what_they_have():
    x, words = jnp.ones((1, 3, 4)), jnp.full((1, 2, 4), 5.0)
    found = with_words(x, jnp.array([[3, -2, 0]]), words)
    np.testing.assert_array_equal(found, x.at[0, 1].set(5.0))


def test_words_follow_the_direction_of_an_embedding_alone():
    module = StyleWords(projection_dim=6, d_model=16, num_words=2, hidden_size=8)
    params = tiny.perturbed(module, jnp.zeros((1, 6)))
    z = jax.random.normal(jax.random.key(0), (3, 6))
    words = module.apply({"params": params}, z)
    assert words.shape == (3, 2, 16)
    np.testing.assert_allclose(module.apply({"params": params}, 7 * z), words, atol=1e-5)
    assert np.abs(module.apply({"params": params}, -z) - words).max() > 0.1
    assert np.isfinite(module.apply({"params": params}, jnp.zeros((1, 6)))).all()

"""Text alignment: known embeddings, chance levels, repeated captions."""

import numpy as np
import pytest

from cnxs_jax.errors import ConfigError, DataError
from eval.metrics.retrieval import clip_score, retrieval_precision

EYE = np.eye(12)


def normal(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_clip_score_is_a_clipped_cosine():
    angle = np.deg2rad([0, 60, 90, 180])
    images = np.stack([np.cos(angle), np.sin(angle)], 1) * [[3], [1], [2], [1]]
    texts = np.tile([5.0, 0.0], (4, 1))
    assert clip_score(images, texts) == pytest.approx([100, 50, 0, 0], abs=1e-12)
    assert clip_score(images, texts, 2.5)[1] == pytest.approx(1.25)


def test_right_wrong_and_shifted_texts():
    assert retrieval_precision(EYE, EYE)["value"] == 1
    near = EYE + 0.1 * np.roll(EYE, 1, 0)  # each picture's second text is the next one
    assert retrieval_precision(near, np.roll(EYE, 1, 0))["value"] == 0
    assert retrieval_precision(near, np.roll(EYE, 1, 0), k=2)["value"] == 1


def test_ties_share_the_places():
    assert retrieval_precision(EYE, np.ones((12, 12)))["value"] == pytest.approx(1 / 12)
    assert retrieval_precision(EYE, np.ones((12, 12)), k=3)["value"] == pytest.approx(3 / 12)
    for pool in (2, 5, 11):
        tied = retrieval_precision(EYE, np.ones((12, 12)), pool=pool)
        assert (tied["low"], tied["high"]) == pytest.approx((1 / pool, 1 / pool))
    texts = np.repeat(normal(6, 300), 2, axis=0)  # every caption twice
    assert retrieval_precision(texts, texts, block=5)["value"] == pytest.approx(0.5)
    assert retrieval_precision(texts, texts, k=2)["value"] == pytest.approx(1)


def test_random_embeddings_have_chance_level_and_the_pool_sets_it():
    images, texts = normal(600, 8), normal(600, 8, 1)
    for pool in (10, 100, None):
        found = retrieval_precision(images, texts, k=2, pool=pool)
        chance = 2 / (pool or 600)
        assert found["chance"] == chance
        assert found["value"] == pytest.approx(chance, abs=4 * np.sqrt(chance / 600))


def test_a_smaller_pool_is_easier_and_reproducible():
    texts = normal(300, 6)
    images = texts + normal(300, 6, 1)
    easy, hard = (retrieval_precision(images, texts, pool=p)["value"] for p in (10, 300))
    assert easy > hard + 0.2
    assert retrieval_precision(images, texts, pool=10)["value"] == easy
    assert retrieval_precision(images, texts)["value"] == hard


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="pool"):
        retrieval_precision(EYE, EYE, pool=13)
    with pytest.raises(DataError, match="paired"):
        clip_score(EYE, EYE[:5])
    with pytest.raises(DataError, match="non-zero"):
        clip_score(EYE, 0 * EYE)

"""Text alignment from embeddings: CLIP score and retrieval precision.

The embeddings may come from CLIP or from any network with one space for both sides; the figures are
named after the network.
"""

import numpy as np

from cnxs_jax.errors import ConfigError, DataError
from eval.metrics import bootstrap, inputs


def clip_score(images, texts, weight=100.0):
    """weight * max(cosine, 0) `[N]` of paired embeddings `[N, d]`.

    Hessel et al. 2021, "CLIPScore", equation (1), which has weight 2.5; text-to-image papers and
    torchmetrics print 100, some 1. Average it with `bootstrap.mean`.

    Raises:
        DataError: embeddings that are not paired, not finite or of length zero.
    """
    images, texts = _unit_pairs(images, texts, "clip_score")
    return weight * np.maximum((images * texts).sum(1), 0)


def retrieval_precision(images, texts, k=1, pool=None, seed=0, block=1024):
    """R-precision: how often a picture's own text is among the k nearest of a pool.

    Xu et al. 2018, "AttnGAN", section 4 (own caption and 99 others, k = 1); with CLIP embeddings:
    Park et al. 2021. Equal similarities share the places, so that repeated captions are neither
    punished nor credited and constant embeddings have chance level, k / pool.

    Args:
        images, texts: paired embeddings `[N, d]`.
        pool: candidates a picture, its own text included; None: all texts (the figure then depends
            on N).
        seed: of the other candidates.

    Returns:
        {"value", "low", "high", "n", "chance"}.

    Raises:
        ConfigError: a pool larger than N, or k not below the pool.
        DataError: embeddings that are not paired, not finite or of length zero.
    """
    images, texts = _unit_pairs(images, texts, "retrieval_precision")
    n = len(images)
    pool = n if pool is None else pool
    if not 1 <= k < pool <= n:
        raise ConfigError(f"k = {k}, pool = {pool}, {n} texts", "retrieval_precision", "k < pool")
    rng = np.random.default_rng(seed)
    hits = np.concatenate(
        [
            _hits(images[rows], texts, np.arange(n)[rows], k, pool, rng)
            for rows in (slice(start, start + block) for start in range(0, n, block))
        ]
    )
    return bootstrap.mean(hits) | {"chance": k / pool}


def _hits(images, texts, own, k, pool, rng):
    """Probability that each row's own text takes one of the first k places of its pool."""
    similarity = images @ texts.T
    others = np.ones(similarity.shape, bool)
    others[np.arange(len(own)), own] = False
    if pool < len(texts):  # the pool - 1 smallest of independent draws are a random subset
        draws = np.where(others, rng.random(similarity.shape), 2.0)
        cut = np.partition(draws, pool - 2, axis=1)[:, pool - 2]
        others = draws <= cut[:, None]
    # A repeated caption's product may round differently by its column: equal within 1e-12.
    margin = similarity - similarity[np.arange(len(own)), own][:, None]
    nearer = (others & (margin > 1e-12)).sum(1)
    equal = (others & (np.abs(margin) <= 1e-12)).sum(1)
    return np.clip((k - nearer) / (equal + 1), 0, 1)


def _unit_pairs(x, y, metric):
    x, y = inputs.features(x, y, metric)
    lengths = [np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y)]
    if len(x) != len(y) or not all(length.all() for length in lengths):
        raise DataError(f"expected paired non-zero embeddings, got {x.shape}, {y.shape}", metric)
    return x / lengths[0], y / lengths[1]

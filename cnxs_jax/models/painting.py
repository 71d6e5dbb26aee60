"""Paint-with-words inside cross-attention (eDiff-I, arXiv 2211.01324, section 4.3).

The scores become `(Q K^T + w A) / sqrt(d)` with `w = w' log(1 + sigma) max(Q K^T)`, where A says
which word is wanted at which pixel. The maximum is taken per example and head over the words that
count, so that a picture does not depend on its batch nor on padding. Read from `cond`:

- `word_mask` [B,H,W,L]: A over the first L tokens of the context, at any resolution;
- `word_weight` [B]: w'; 0 is no painting (what the unconditional half of guidance gets);
- `word_tokens` [B,L], optional: 1 for the tokens of the attention mask whose scores enter the
  maximum, to leave out a start token that the mask keeps. All of its tokens unless given;
- `sigma` [B]: the noise level sigma / alpha, which the sampling loop writes.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnxs_jax.errors import ConfigError


class Paint(NamedTuple):
    """Painted words at one resolution: w' log(1 + sigma), A, and the tokens that count or None."""

    strength_B: Any
    words_BxNxS: Any
    tokens_BxS: Any


def paint_at(cond, size, context_length):
    """The `Paint` of a cross-attention at `size` (height, width), or None without `word_mask`.

    Args:
        context_length: S; columns behind the L painted ones (null token) are zero.

    Raises:
        ConfigError: `sigma` or `word_weight` is missing, or L exceeds S.
    """
    if "word_mask" not in cond:
        return None
    for name in ("word_weight", "sigma"):
        if name not in cond:
            raise ConfigError(f"painted words need {name}", f'cond["{name}"]', "give an array [B]")
    mask = cond["word_mask"].astype(jnp.float32)
    spare = context_length - mask.shape[-1]
    if spare < 0:
        raise ConfigError(
            f"{mask.shape[-1]} painted columns, but the context has {context_length} tokens",
            'cond["word_mask"]',
        )
    words = resize(mask, size).reshape(mask.shape[0], -1, mask.shape[-1])
    tokens = cond.get("word_tokens")
    return Paint(
        cond["word_weight"].astype(jnp.float32) * jnp.log1p(cond["sigma"].astype(jnp.float32)),
        jnp.pad(words, ((0, 0), (0, 0), (0, spare))),
        None if tokens is None else jnp.pad(tokens, ((0, 0), (0, spare))),
    )


def resize(mask_BxHxWxL, size):
    """Share of each cell of a `size` grid that the mask covers: [B,*size,L]."""
    B, H, W, L = mask_BxHxWxL.shape
    h, w = size
    if H % h == 0 and W % w == 0:
        return mask_BxHxWxL.reshape(B, h, H // h, w, W // w, L).mean((2, 4))
    return jax.image.resize(mask_BxHxWxL, (B, h, w, L), "linear")


def score_bias(paint, q_BxNxHxD, k_BxSxHxD, mask_BxS=None):
    """The painted term `w A / sqrt(D)`, float32 [B,H,N,S], to be added to the scaled scores."""
    # The einsum of the attention itself, word for word, so that the compiler computes it once.
    scores = jnp.einsum("blhd,bshd->bhls", q_BxNxHxD, k_BxSxHxD, preferred_element_type=jnp.float32)
    for counted in (mask_BxS, paint.tokens_BxS):
        if counted is not None:
            scores = jnp.where(counted[:, None, None, :] > 0, scores, -jnp.inf)
    top_BxH = scores.max((2, 3))
    top_BxH = jnp.where(jnp.isfinite(top_BxH), top_BxH, 0.0)  # no word counts: nothing to paint
    w_BxH = paint.strength_B[:, None] * top_BxH / math.sqrt(q_BxNxHxD.shape[-1])
    return w_BxH[:, :, None, None] * paint.words_BxNxS[:, None]

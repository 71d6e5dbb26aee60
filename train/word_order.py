"""Telling a token's neighbours from its encoding: what a new text encoder must learn first.

A published T5 comes with its language. One that is trained along with a small denoiser does not
find the order of the words by itself: after 12,000 steps the encoding of "tiger" in "a tiger left
of a carrot" and in "a carrot left of a tiger" differed by 0.02 % of its length, and the pictures
had the right axis and a random side. So linear heads predict the three tokens on either side of
each token; they are trained beside the denoiser and are not exported.
"""

import jax.numpy as jnp
import numpy as np
import optax

from train.parts import with_head

OFFSETS = np.array([-3, -2, -1, 1, 2, 3])
NAME = "neighbours"  # of the heads' kernels [offsets, width, vocabulary] among the parameters


def with_heads(init, text_module):
    """`init` with the heads beside it (`parts.with_head`)."""
    return with_head(init, NAME, (len(OFFSETS), text_module.d_model, text_module.vocab_size), 0.1)


def loss(heads, text_BxLxD, ids_BxL, mask_BxL):
    """Mean cross-entropy over each caption's pairs of neighbours, nats; float32 `[B]`."""
    length = ids_BxL.shape[1]
    there = np.arange(length) + OFFSETS[:, None]
    inside = (there >= 0) & (there < length)
    there = np.clip(there, 0, length - 1)
    logits = jnp.einsum("bld,odv->bolv", text_BxLxD, heads)
    wrong = optax.softmax_cross_entropy_with_integer_labels(logits, ids_BxL[:, there])
    weight = mask_BxL[:, None] * mask_BxL[:, there] * inside[None]
    return (weight * wrong).sum((1, 2)) / jnp.maximum(weight.sum((1, 2)), 1)

"""Words of a text encoder's own input space that say what a reference picture's style is.

eDiff-I puts a picture's CLIP embedding beside the text tokens and trains its denoiser on it
(arXiv 2211.01324, section 4.1). A denoiser that was trained on text alone takes a style by the same
road as its words: the embedding becomes pseudo-words, as textual inversion learns one for each
concept (arXiv 2208.01618), here by a network that reads any picture. The text encoder puts them
into context, and it and the denoiser stay as they are.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from cnxs_jax.models.activations import gelu_tanh
from cnxs_jax.models.layers import Dense


class StyleWords(nn.Module):
    """`apply({"params": p}, embedding [B,projection_dim]) -> [B,num_words,d_model]` float32.

    Two layers. The embedding's length says nothing in CLIP: it is normalised.

    Args:
        projection_dim: channels of CLIP's picture embedding.
        d_model: those of the text encoder's input.
        num_words: pseudo-words a picture.
        hidden_size: channels between the two layers.
    """

    projection_dim: int = 768
    d_model: int = 4096
    num_words: int = 4
    hidden_size: int = 1024
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, embedding_BxP):
        x = embedding_BxP.astype(jnp.float32)
        length = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
        x = x / length * self.projection_dim**0.5
        h = gelu_tanh(Dense(self.hidden_size, dtype=self.dtype, name="linear_1")(x))
        words = Dense(self.num_words * self.d_model, dtype=self.dtype, name="linear_2")(h)
        return words.astype(jnp.float32).reshape(-1, self.num_words, self.d_model)


def placeholders(count):
    """Ids that stand for pseudo-words: -1, -2, ..., which no tokenizer gives."""
    return -1 - np.arange(count, dtype=np.int32)


def with_words(x_BxLxD, ids_BxL, words_BxnxD):
    """`x` with pseudo-word k in every place whose id is -1-k."""
    index = jnp.clip(-1 - ids_BxL, 0, words_BxnxD.shape[1] - 1)
    own = jnp.take_along_axis(words_BxnxD, index[..., None], axis=1)
    return jnp.where((ids_BxL < 0)[..., None], own.astype(x_BxLxD.dtype), x_BxLxD)

"""PixArt-alpha and PixArt-delta (arXiv 2310.00426, 2401.05252) as a pipeline family."""

import warnings

import jax.numpy as jnp
import numpy as np

from cnxs_jax.data import text as tokens
from cnxs_jax.pipelines.base import Pipeline, encode_text
from cnxs_jax.pipelines.sizes import bins, check_side, nearest_bin

MAX_TOKENS = 120  # PixArt's training length


class PixArtAlphaPipeline(Pipeline):
    """T5 text encoder, DiT, KL autoencoder.

    Guidance: with a stored null caption the unconditional half sees it under the prompt's own
    mask, as PixArt trains (convention `learned`); without one, or with a negative prompt, it sees
    that text (by default "") under its own mask, as diffusers does (`empty_prompt`).
    """

    class_name = "PixArtAlphaPipeline"
    denoiser = "transformer"
    # Directory -> (library, class) written to model_index.json, in diffusers' order.
    classes = {
        "scheduler": ("diffusers", None),
        "text_encoder": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "T5Tokenizer"),
        "transformer": ("diffusers", "PixArtTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    steps = 20
    guidance_scale = 4.5

    def sizes(self, height, width):
        """Sizes of result and drawing; the published models draw their nearest aspect bin."""
        module = self.components["transformer"].module
        table = bins(module.sample_size, self.factor)
        if table is None:
            return super().sizes(height, width)
        own = module.sample_size * self.factor
        size = (own if height is None else height, own if width is None else width)
        for name, side in zip(("height", "width"), size, strict=True):
            check_side(name, side)
        return size, nearest_bin(*size, table)

    def encode(self, request, size):
        """`text`, `text_mask`, for 1024-MS `size` and `aspect`; `null` when guided."""
        text, mask = self._embed(request.prompts, "prompt")
        rows = request.repeats
        cond = {"text": jnp.repeat(text, rows, axis=0), "text_mask": jnp.repeat(mask, rows, axis=0)}
        if self.components["transformer"].module.micro_conditioning:
            batch = (request.batch, 1)
            cond["size"] = jnp.tile(jnp.asarray([size], jnp.float32), batch)
            cond["aspect"] = jnp.full(batch, size[0] / size[1], jnp.float32)
        if request.guided:
            cond["guidance_scale"] = jnp.full((request.batch,), request.guidance, jnp.float32)
            cond["null"] = self._null(request)
        return cond

    def _null(self, request):
        if self.null_text is not None and request.negatives is None:
            length = self.max_tokens
            null = jnp.asarray(self.null_text, jnp.float32)[:length]
            return {"text": jnp.broadcast_to(null, (request.batch, *null.shape))}
        negatives = request.negatives
        text, mask = self._embed([""] if negatives is None else negatives, "negative_prompt")
        rows = request.batch if negatives is None else request.repeats
        return {"text": jnp.repeat(text, rows, axis=0), "text_mask": jnp.repeat(mask, rows, axis=0)}

    def _embed(self, texts, name):
        """Encoded text [B,L,D] and mask [B,L] of one text a prompt."""
        ids, mask = self.tokens(texts, name)
        network = self.components["text_encoder"]
        text = encode_text(*network, *self._rows((jnp.asarray(ids), jnp.asarray(mask))))
        return text[: len(texts)], jnp.asarray(mask)

    @property
    def max_tokens(self):
        """Tokens a text is padded or cut to: PixArt's 120, or fewer if the tokenizer says so."""
        return min(MAX_TOKENS, self.tokenizer.model_max_length)

"""PixArt-alpha, -delta and -Sigma (arXiv 2310.00426, 2401.05252, 2403.04692) as families."""

import jax.numpy as jnp

from cnxs_jax.data import caption_cleaning
from cnxs_jax.data import text as tokens
from cnxs_jax.models.style_words import placeholders
from cnxs_jax.pipelines import style as styles
from cnxs_jax.pipelines.base import Pipeline
from cnxs_jax.pipelines.programs import encode_text, repeated
from cnxs_jax.pipelines.sizes import bins, nearest_bin


class PixArtAlphaPipeline(Pipeline):
    """T5 text encoder, DiT, KL autoencoder.

    Guidance: with a stored null caption the unconditional half sees it under the prompt's own
    mask, as PixArt trains (convention `learned`); without one, or with a negative prompt, it sees
    that text (by default "") under its own mask, as diffusers does (`empty_prompt`).
    """

    class_name = "PixArtAlphaPipeline"
    denoiser = "transformer"
    style_reader = "text_encoder"
    style_part = "style words (`style`; configs/pixart_style.py trains them)"
    # Directory -> (library, class) written to model_index.json, in diffusers' order.
    classes = {
        "scheduler": ("diffusers", None),
        "text_encoder": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "T5Tokenizer"),
        "transformer": ("diffusers", "PixArtTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    networks = ("transformer", "vae", "text_encoder")
    controlled = {
        "PixArtControlNetAdapterModel": ("PixArtAlphaControlnetPipeline", "official"),
    }
    most_tokens = 120  # the training length
    steps = 20
    guidance_scale = 4.5
    load_tokenizer = staticmethod(tokens.load_tokenizer)

    def sizes(self, height, width):
        """Sizes of result and drawing; the published models draw their nearest aspect bin."""
        module = self.components["transformer"].module
        table = bins(module.sample_size, self.factor)
        if table is None:
            return super().sizes(height, width)
        size = self.asked_size(height, width)
        return size, nearest_bin(*size, table)

    def encode(self, request, size):
        """`text`, `text_mask`, for 1024-MS `size` and `aspect`; `null` when guided."""
        given = request.style if self.style is not None else None
        words = None if given is None else self.style.read(given.pictures, self.run)
        cond = self._text(request.prompts, request.repeats, words)
        if given is not None and given.scale is not None:
            cond["unstyled"] = self._text(request.prompts, request.repeats)
            cond["style_scale"] = jnp.full((request.batch,), given.scale, jnp.float32)
        if self.components["transformer"].module.micro_conditioning:
            batch = (request.batch, 1)
            cond["size"] = jnp.tile(jnp.asarray([size], jnp.float32), batch)
            cond["aspect"] = jnp.full(batch, size[0] / size[1], jnp.float32)
        if request.guided:
            cond["guidance_scale"] = jnp.full((request.batch,), request.guidance, jnp.float32)
            cond["null"] = self._null(request)
        return cond

    @property
    def max_tokens(self):
        """Tokens a text is padded or cut to: `most_tokens`, or what tokenizer or null has."""
        null = self.most_tokens if self.null_text is None else len(self.null_text)
        return min(self.most_tokens, self.tokenizer.model_max_length, null)

    def clean(self, text):
        """The text as PixArt was trained on it."""
        return caption_cleaning.clean_caption(text)

    def _null(self, request):
        """What is read without the prompt; a learned null under the mask of the prompt alone."""
        if self.null_text is not None and request.negatives is None:
            null = self.null_text[: self.max_tokens]
            found = {"text": jnp.broadcast_to(null, (request.batch, *null.shape))}
            if self.style is None or request.style is None:
                return found
            _, mask = self._tokens(request.prompts)  # without the style's words
            return {**found, "text_mask": jnp.repeat(mask, request.repeats, axis=0)}
        # One row serves all images where there is no negative prompt.
        if request.negatives is None:
            return self._text([""], request.batch)
        return self._text(request.negatives, request.repeats)

    def _text(self, texts, repeats, words=None):
        """`text` and `text_mask` of a list of texts, with pseudo-words [texts,n,D] in each."""
        ids, mask = self._tokens(texts, 0 if words is None else self.style.count)
        inputs = self._rows((ids, mask) if words is None else (ids, mask, words))
        text = self.run(self.components["text_encoder"], encode_text, *inputs)
        return repeated({"text": text[: len(texts)], "text_mask": mask}, repeats)

    def _tokens(self, texts, count=0):
        """Ids and mask [texts,L], with `count` placeholders of pseudo-words in each."""
        ids, mask = caption_cleaning.tokenize(self.tokenizer, texts, self.max_tokens - count)
        if count:
            ids, mask = styles.insert(ids, mask, placeholders(count), self.max_tokens)
        return jnp.asarray(ids), jnp.asarray(mask)


class PixArtSigmaPipeline(PixArtAlphaPipeline):
    """The same on SDXL's autoencoder with texts of 300 tokens.

    Its model of 2048 px draws the size asked for, without bins.
    """

    class_name = "PixArtSigmaPipeline"
    controlled = {}
    most_tokens = 300

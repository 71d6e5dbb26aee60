"""Stable Diffusion 1.5, 2.1 (arXiv 2112.10752) and SDXL (arXiv 2307.01952) as pipeline families."""

import jax.numpy as jnp

from cnxs_jax.data import text as texts_to_tokens
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines.base import Pipeline
from cnxs_jax.pipelines.programs import encode_text, repeated

AESTHETIC_SCORE, NEGATIVE_SCORE = 6.0, 2.5  # diffusers' defaults of the two halves
LCM_GUIDANCE = 8.5  # diffusers' default where the guidance scale is an input of the network


class StableDiffusionPipeline(Pipeline):
    """CLIP text encoder, UNet, KL autoencoder; predictions of epsilon or v, as the scheduler says.

    All 77 tokens are attended to, padding too, as these models are trained. Guidance follows the
    convention `empty_prompt`: the unconditional half sees the negative prompt, by default "". A
    UNet with `time_cond_proj_dim` (latent consistency models) takes the guidance scale as an input
    instead, and then there is no unconditional half.
    """

    class_name = "StableDiffusionPipeline"
    denoiser = "unet"
    # Directory -> (library, class) written to model_index.json, in diffusers' order.
    classes = {
        "scheduler": ("diffusers", None),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    networks = ("unet", "vae", "text_encoder")
    default_options = {"requires_safety_checker": False}
    controlled = {
        "ControlNetXSAdapter": ("StableDiffusionControlNetXSPipeline", "diffusers"),
        "ControlNetModel": ("StableDiffusionControlNetPipeline", "official"),
    }
    steps = 50
    guidance_scale = 7.5
    text_encoder = "text_encoder"  # whose positions bound the tokens
    load_tokenizer = staticmethod(texts_to_tokens.load_tokenizer)

    def check(self):
        """Raises ConfigError where text encoders, UNet and controllers do not fit together."""
        super().check()
        encoders = [c.module for n, c in self.components.items() if n.startswith("text_encoder")]
        width, read = sum(e.hidden_size for e in encoders), self.components["unet"].module
        if width != read.cross_attention_dim:
            raise ConfigError(
                f"text of width {width}, the UNet reads {read.cross_attention_dim}",
                self.class_name,
                "the directory mixes parts of different models",
            )

    def defaults(self):
        """(steps, guidance scale) of a call that names none."""
        steps, guidance = super().defaults()
        return steps, LCM_GUIDANCE if self.guidance_is_input else guidance

    @property
    def guidance_is_input(self):
        """Whether the network itself takes the guidance scale."""
        return bool(self.components["unet"].module.time_cond_proj_dim)

    @property
    def max_tokens(self):
        """Tokens a text is padded or cut to: 77 in the published models."""
        tokenizer = self.tokenizer[0] if isinstance(self.tokenizer, tuple) else self.tokenizer
        positions = self.components[self.text_encoder].module.max_position_embeddings
        return min(tokenizer.model_max_length, positions)

    def encode(self, request, size):
        """`text`, SDXL's `pooled` and `time_ids`; `guidance`, or `null` when guided."""
        cond = repeated(self.embed(request.prompts), request.repeats)
        cond |= self.micro_condition(request.batch, size)
        scale = jnp.full((request.batch,), request.guidance, jnp.float32)
        if self.guidance_is_input:
            return {**cond, "guidance": scale - 1.0}
        if not request.guided:
            return cond
        return {**cond, "guidance_scale": scale, "null": self.null(request)}

    def embed(self, texts):
        """What the text encoder makes of B texts: `text` [B,L,D]."""
        return {"text": self.encoded("text_encoder", self.tokenizer, texts)["last"]}

    def micro_condition(self, batch, size):
        """What the network is told about the picture; nothing here."""
        return {}

    def null(self, request):
        """What differs in the unconditional half: the negative prompt's embedding, one row each."""
        if request.negatives is None:  # one row serves all images
            return repeated(self.embed([""]), request.batch)
        return repeated(self.embed(request.negatives), request.repeats)

    def encoded(self, name, tokenizer, texts):
        """The outputs {"last", "penultimate", "pooled"} of one text encoder."""
        ids, _ = texts_to_tokens.tokenize(tokenizer, texts, self.max_tokens)
        out = self.run(self.components[name], encode_text, self._rows(jnp.asarray(ids)), None)
        return {key: value[: len(texts)] for key, value in out.items()}


class StableDiffusionXLPipeline(StableDiffusionPipeline):
    """Two text encoders side by side, pooled text and the picture's size as further conditions.

    Without a negative prompt the unconditional half sees zeros, as SDXL is trained
    (`force_zeros_for_empty_prompt` of model_index.json).
    """

    class_name = "StableDiffusionXLPipeline"
    classes = {
        "scheduler": ("diffusers", None),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    networks = ("unet", "vae", "text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    default_options = {"force_zeros_for_empty_prompt": True}
    controlled = {
        "ControlNetXSAdapter": ("StableDiffusionXLControlNetXSPipeline", "diffusers"),
        "ControlNetModel": ("StableDiffusionXLControlNetPipeline", "official"),
    }
    guidance_scale = 5.0

    def contexts(self):
        """Both encoders' features of one token lie side by side: one context of tokens."""
        return [(self.tokenizer[0], self.max_tokens)]

    def embed(self, texts):
        """`text` [B,L,D1+D2] of both encoders' penultimate layers, `pooled` [B,P] of the second."""
        first = self.encoded("text_encoder", self.tokenizer[0], texts)
        second = self.encoded("text_encoder_2", self.tokenizer[1], texts)
        both = [first["penultimate"], second["penultimate"]]
        return {"text": jnp.concatenate(both, axis=-1), "pooled": second["pooled"]}

    def micro_condition(self, batch, size):
        """`time_ids` [B,6]: original size, crop corner, target size (section 2.2 of the paper)."""
        ids = jnp.asarray([(*size, 0, 0, *size)], jnp.float32)
        return {"time_ids": jnp.repeat(ids, batch, axis=0)}

    def null(self, request):
        """The negative prompt's embedding, or zeros where there is none."""
        found = super().null(request)
        if request.negatives is None and self.option("force_zeros_for_empty_prompt"):
            return {name: jnp.zeros_like(value) for name, value in found.items()}
        return found


class StableDiffusionXLImg2ImgPipeline(StableDiffusionXLPipeline):
    """SDXL's refiner: the low noise of SDXL's pictures, as one of its `experts`; draws none alone.

    It reads the second text encoder alone and, in the place of the target size, how beautiful the
    picture is to be.
    """

    class_name = "StableDiffusionXLImg2ImgPipeline"
    classes = {
        name: kind
        for name, kind in StableDiffusionXLPipeline.classes.items()
        if name not in ("text_encoder", "tokenizer")
    }
    networks = ("unet", "vae", "text_encoder_2")
    tokenizers = ("tokenizer_2",)
    default_options = {"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": False}
    controlled = {}
    text_encoder = "text_encoder_2"

    def _call(self, given):
        what = f"a {self.class_name} refines what another pipeline began, it draws nothing alone"
        raise ConfigError(what, self.class_name, 'load_pipeline(SDXL, experts=[{"below": 200, …}])')

    def contexts(self):
        """One encoder's tokens."""
        return [(self.tokenizer, self.max_tokens)]

    def embed(self, texts):
        """`text` [B,L,D] of the penultimate layer, `pooled` [B,P]."""
        found = self.encoded("text_encoder_2", self.tokenizer, texts)
        return {"text": found["penultimate"], "pooled": found["pooled"]}

    def micro_condition(self, batch, size, score=AESTHETIC_SCORE):
        """`time_ids` [B,5]: original size, crop corner, aesthetic score; without scores SDXL's."""
        if not self.option("requires_aesthetics_score"):
            return super().micro_condition(batch, size)
        return {
            "time_ids": jnp.repeat(jnp.asarray([(*size, 0, 0, score)], jnp.float32), batch, axis=0)
        }

    def encode(self, request, size):
        """As SDXL's; the unconditional half is told of a lower score."""
        cond = super().encode(request, size)
        if "null" in cond:
            cond["null"] |= self.micro_condition(request.batch, size, NEGATIVE_SCORE)
        return cond

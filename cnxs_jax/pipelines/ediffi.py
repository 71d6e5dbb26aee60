"""eDiff-I's cascade (arXiv 2211.01324): a base stage and super-resolution stages, each of experts.

No layout of it was ever published. `save_pipeline` writes, and `load_pipeline` reads:

    model_index.json                    {"_class_name": "EDiffIPipeline", "stages": [name, ...]}
    <stage>/stage.json                  sizes, noise distribution, sampler, the experts' quantiles
    <stage>/expert_<i>/                 config.json and safetensors, lowest noise first
    text_encoder/ tokenizer/            T5, as transformers has it
    clip_text_encoder/ clip_image_encoder/ clip_tokenizer/      CLIP; any encoder may be missing

With `"encoders_beside": {"text": NAME, ...}` the index names neighbouring directories for them.
"""

import contextlib
import dataclasses
import functools
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.control import paint
from cnxs_jax.data import text as texts_to_tokens
from cnxs_jax.diffusion import edm
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.models.conditioning import Encoders, dropped
from cnxs_jax.pipelines import cascade, programs
from cnxs_jax.pipelines import images as pictures
from cnxs_jax.pipelines import request as requests
from cnxs_jax.pipelines import style as styles
from cnxs_jax.pipelines.interface import Result, TextToImage, request_of
from cnxs_jax.pipelines.load import place
from cnxs_jax.pipelines.scheduler import read_json
from cnxs_jax.storage import write_json


@functools.partial(jax.jit, static_argnames=("encoders",))
def encode(encoders, params, inputs):
    """The encoders' part of a condition."""
    return encoders(params, inputs)


@functools.partial(jax.jit, static_argnames=("number", "sizes"))
def noises(keys_B, number, sizes):
    """Standard normal pictures for stage `number`, of its size and of the low resolution's."""

    def one(key):
        pair = jax.random.split(jax.random.fold_in(key, number))
        return [jax.random.normal(k, (side, side, 3)) for k, side in zip(pair, sizes, strict=True)]

    return jax.vmap(one)(keys_B)


@dataclasses.dataclass(frozen=True)
class EDiffIPipeline(TextToImage):
    """Text to image by a cascade of expert ensembles, in the last stage's size.

    The base paints words (section 4.3) and starts from `latents`; "latent" output is float32
    pictures in [-1, 1].

    Attributes:
        stages: `Stage`s, the base first.
        encoders, encoder_params: `Encoders` and a tree for each of them.
        tokenizers: {"text": ..., "clip_text": ...}, of the encoders that are there.
        max_tokens: {encoder: tokens that a text is padded or cut to}.
        mesh: devices that share parameters and batch, or None for one device.
    """

    stages: tuple
    encoders: Encoders
    encoder_params: dict
    tokenizers: dict
    max_tokens: dict
    mesh: Any = None

    class_name: ClassVar[str] = "EDiffIPipeline"

    @property
    def styled(self):
        """Whether there is an encoder for reference pictures."""
        return self.encoders.clip_image is not None

    def _call(self, given):
        style_image, style_scale = given["style_image"], given["style_scale"]
        amounts = zip(
            self.per_stage(given["num_inference_steps"], "steps", "num_inference_steps"),
            self.per_stage(given["guidance_scale"], "guidance_scale", "guidance_scale"),
            strict=True,
        )
        rows = [request_of(given, steps, scale) for steps, scale in amounts]
        self.check_size(rows[0])
        style_scale = styles.check_scale(style_scale, style_image is not None and rows[0].guided)
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            x = self.drawn(rows, style_image, style_scale)
        return self.result(np.asarray(x, np.float32)[: rows[0].batch], rows, style_scale)

    def drawn(self, rows, style_image, style_scale):
        """The last stage's pictures, float32 [B,H,W,3]; on a mesh of a batch that it divides."""
        cond, null = self.condition(rows[0], style_image)
        base = self.painted(rows[0])
        noise, keys = programs.draw(
            rows[0].seeds, rows[0].indices, (self.stages[0].size,) * 2 + (3,)
        )
        x = noise if rows[0].latents is None else jnp.asarray(rows[0].latents)
        cond, null, base, x, keys = programs.over(self.mesh, (cond, null, base, x, keys))
        for number, (stage, row) in enumerate(zip(self.stages, rows, strict=True)):
            own, own_null = base if number == 0 else ({}, {})
            whole = guided({**cond, **own}, {**null, **own_null}, row, style_scale)
            if number:
                start, noise = noises(keys, number, (stage.size, x.shape[1]))
                whole, x = augmented(whole, x, noise, stage), start
            x = stage.draw(x, whole, row.steps)
        return x

    def per_stage(self, value, field, name):
        """One number a stage from an argument and the stages' own."""
        own = [getattr(stage.sampler, field) for stage in self.stages]
        if isinstance(value, list | tuple):
            if len(value) != len(own):
                raise ConfigError(f"{len(value)} values for {len(own)} stages", name)
            return [mine if v is None else v for v, mine in zip(value, own, strict=True)]
        return own if value is None else [value, *own[1:]]

    def defaults(self):
        """(steps, guidance scale) of the base in a call that names none."""
        sampler = self.stages[0].sampler
        return sampler.steps, sampler.guidance_scale

    def sizes(self, height, width):
        """Sizes of result and drawing: the last stage's."""
        own = self.stages[-1].size
        for name, side in (("height", height), ("width", width)):
            if side not in (None, own):
                raise ConfigError(f"the cascade draws {own} px", name, "leave it out")
        return (own, own), (own, own)

    def check_size(self, request):
        """Raises ConfigError for another size, or noise of another shape."""
        self.sizes(request.height, request.width)
        first, given = self.stages[0].size, request.latents
        if given is not None and given.shape[1:] != (first, first, 3):
            raise ConfigError(
                f"expected [{request.batch},{first},{first},3], got {list(given.shape)}", "latents"
            )

    def condition(self, request, style_image):
        """`(cond, null)`, one row an image, of the texts and the reference pictures."""
        inputs = self.tokens(request.prompts)
        if style_image is not None:
            inputs["clip_pixels"] = self.references(style_image, len(request.prompts))
        cond = encode(self.encoders, self.encoder_params, inputs)
        null = dropped(cond)
        if request.negatives is not None:
            null |= encode(self.encoders, self.encoder_params, self.tokens(request.negatives))
        repeat = functools.partial(jnp.repeat, repeats=request.repeats, axis=0)
        # Waited for: else encoders from host memory would be on the device beside the first expert.
        return jax.block_until_ready(jax.tree.map(repeat, (cond, null)))

    def tokens(self, texts):
        """Ids and masks of a list of texts for each text encoder."""
        found = {}
        for name, prefix in (("text", ""), ("clip_text", "clip_")):
            if name in self.tokenizers:
                ids, mask = texts_to_tokens.tokenize(
                    self.tokenizers[name], texts, self.max_tokens[name]
                )
                found |= {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
        return found

    def embeddings(self, given):
        """CLIP's embeddings [N,P] of a list of pictures."""
        pixels = self.references(given, len(given))
        module, params = self.encoders.clip_image, self.encoder_params["clip_image"]
        return programs.apply(module, params, pixels)

    def references(self, style_image, count):
        """CLIP's input of one reference picture a prompt."""
        size = self.encoders.clip_image.image_size
        return styles.clip_input(styles.one_a_prompt(style_image, count), size)

    def contexts(self):
        """[(tokenizer, length)] of the encoders that are there, in the context's order."""
        order = [n for n in ("text", "clip_text") if n in self.tokenizers]
        return [(self.tokenizers[n], self.max_tokens[n]) for n in order]

    def painted(self, request):
        """`(keys of cond, keys of null)` of painted words; empty without masks."""
        if request.word_masks is None:
            return {}, {}
        side = (self.stages[0].size,) * 2
        made = paint.word_condition(self.contexts(), request.prompts, request.word_masks, side)
        repeat = functools.partial(np.repeat, repeats=request.repeats, axis=0)
        return jax.tree.map(lambda a: jnp.asarray(repeat(a)), made)

    def result(self, out, rows, style_scale):
        """The Result of the last stage's pictures."""
        request = rows[0]
        requests.check_finite(out, request)
        parameters = [
            {
                "prompt": request.prompts[n // request.repeats],
                "negative_prompt": request.negatives and request.negatives[n // request.repeats],
                "seed": int(request.seeds[n]),
                "index": int(request.indices[n]),
                "steps": [row.steps for row in rows],
                "guidance": [row.guidance for row in rows],
                "style_scale": style_scale,
                "word_masks": request.word_masks is not None,
                "pipeline": self.class_name,
            }
            for n in range(request.batch)
        ]
        if request.output_type == "latent":
            return Result(out, parameters)
        out = np.clip(out * 0.5 + 0.5, 0.0, 1.0)
        return Result(out if request.output_type == "np" else pictures.to_pil(out), parameters)

    def write(self, directory, dtype=None):
        """Writes the layout above into `directory`."""
        index = {
            "_class_name": self.class_name,
            "stages": [stage.name for stage in self.stages],
            "max_tokens": self.max_tokens,
        }
        write_json(directory / "model_index.json", index)
        for stage in self.stages:
            cascade.write_stage(stage, directory / stage.name, dtype)
        cascade.write_encoders(
            self.encoders, self.encoder_params, self.tokenizers, directory, dtype
        )

    @classmethod
    def read(cls, directory, dtype=None, compat=None, mesh=None, offload=None, **parts):
        """The pipeline in `directory`, on a mesh or, offloaded, its experts one at a time."""
        requests.refuse_parts(cls.class_name, **parts)
        if offload == "sequential":
            what = "a cascade's T5 is not streamed block by block"
            raise ConfigError(what, "offload", 'use offload="model"')
        put = None if offload else functools.partial(place, mesh=mesh)
        index = read_json(directory / "model_index.json")
        names, limits = index.get("stages"), index.get("max_tokens")
        plain = isinstance(names, list) and all(re.fullmatch(r"[\w-]+", str(n)) for n in names)
        if not plain or not names or not isinstance(limits, dict):
            raise CheckpointError("no stages or max_tokens", str(directory / "model_index.json"))
        stages = tuple(cascade.read_stage(directory / name, name, dtype, put) for name in names)
        encoders = cascade.read_encoders(directory, dtype, index.get("encoders_beside"), put)
        for stage in stages:
            for expert in stage.experts:
                encoders[0].check(expert.module, stage.name)
        return cls(stages, *encoders, limits, mesh)


def guided(cond, null, request, style_scale):
    """`cond` with what guidance reads, where the request asks for guidance."""
    if not request.guided:
        return cond
    batch = len(jax.tree.leaves(cond)[0])  # a mesh may have made it larger than the request's
    scale = jnp.full((batch,), request.guidance, jnp.float32)
    cond = {**cond, "null": null, "guidance_scale": scale}
    if style_scale is None:
        return cond
    unstyled = {"clip_image_mask": jnp.zeros_like(cond["clip_image_mask"])}
    weight = jnp.full((batch,), style_scale, jnp.float32)
    return {**cond, "unstyled": unstyled, "style_scale": weight}


def augmented(cond, x, noise, stage):
    """`cond` with the previous stage's pictures at the stage's noise-augmentation level."""
    level = jnp.full(x.shape[:1], stage.sampler.noise_level or 0.0, jnp.float32)
    return edm.augment_low_res({**cond, "low_res": jnp.clip(x, -1.0, 1.0)}, level, noise)

"""The one pipeline: text -> condition -> latents -> pictures, the same for every model family.

A family (pixart.py) says which components it has, its defaults, its sizes and how texts become a
condition.
"""

import contextlib
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.control.paint import word_condition
from cnxs_jax.diffusion import sampling, solvers
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.unet import latent_sides
from cnxs_jax.pipelines import adapters, diffusers_layout, expert_fit, offload, programs
from cnxs_jax.pipelines import control as controls
from cnxs_jax.pipelines import experts as ensembles
from cnxs_jax.pipelines import images as pictures
from cnxs_jax.pipelines import request as requests
from cnxs_jax.pipelines import style as styles
from cnxs_jax.pipelines.interface import CONTROL, Component, Result, TextToImage, request_of
from cnxs_jax.pipelines.scheduler import is_lcm, override
from cnxs_jax.pipelines.sizes import check_side


@dataclasses.dataclass(frozen=True)
class Pipeline(TextToImage):
    """Text to image. Made by `load_pipeline`; `pipe(prompt, ...)` draws.

    Attributes:
        components: {name: Component}, diffusers' names.
        tokenizer: turns texts into ids and a mask on the host; a tuple where there are several.
        scheduler: a diffusers scheduler config (with `_class_name`).
        null_text: [L,D] learned unconditional caption, or None for the empty prompt.
        mesh: devices that share parameters and batch, or None for one device.
        controllers: what is attached to the denoiser, a tuple of `control.Controller`.
        options: entries of model_index.json that are no components.
        offload: None, or "model" or "sequential": the networks lie on the host (`offload`).
        vae_tile: latents a side that the autoencoder decodes at once, or None for all.
        compat: whose computation a further ControlNet-XS follows that does not say it itself.
        plain: where adapters are merged into the denoiser, its parameters without them.
        experts: those that take over below some noise, lowest first (`pipelines.experts`).
        style: what reads reference pictures, a `pipelines.style.Style`, or None.
    """

    components: dict[str, Component]
    tokenizer: Any
    scheduler: dict
    null_text: Any = None
    mesh: Any = None
    controllers: tuple = ()
    options: dict = dataclasses.field(default_factory=dict)
    offload: str | None = None
    vae_tile: int | None = None
    compat: str = "official"
    plain: Any = None
    experts: tuple = ()
    style: Any = None

    classes: ClassVar[dict]  # {directory: (library, class)} of model_index.json
    networks: ClassVar[tuple]  # the directories that hold networks
    tokenizers: ClassVar[tuple] = ("tokenizer",)
    default_options: ClassVar[dict] = {}
    # {class of an adapter: diffusers' pipeline class with it, whose computation that one follows}
    controlled: ClassVar[dict] = {}
    denoiser: ClassVar[str]  # the one that samples
    style_reader: ClassVar[str | None] = None  # the text encoder that takes pseudo-words
    steps: ClassVar[int] = 20
    guidance_scale: ClassVar[float] = 7.5

    def _call(self, given):
        named = (given["num_inference_steps"], given["guidance_scale"])
        both = zip(named, self.defaults(), strict=True)
        request = request_of(given, *(own if value is None else value for value, own in both))
        wanted = (given[name] for name in CONTROL)
        control = controls.check(self.controllers, *wanted, request) if self.controllers else None
        if self.style is not None:
            found = styles.reference(given["style_image"], given["style_scale"], request)
            request = dataclasses.replace(request, style=found)
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return self._draw(request, control)

    def _draw(self, request, control):
        height, width = request.height, request.width
        if control is not None:
            height, width = control.sides(height, width, self.multiple)
        size, drawn = self.sizes(height, width)
        shape = self.latent_shape(drawn)
        if request.latents is not None and request.latents.shape[1:] != shape:
            raise ConfigError(
                f"expected [{request.batch},{','.join(map(str, shape))}], "
                f"got {list(request.latents.shape)}",
                "latents",
            )
        table = self.table(request.steps)
        if control is not None:
            table = table.with_control(control.start, control.end)
        table = ensembles.route(table, self.experts)
        networks, conds = ensembles.members(self, table, request, control, drawn, shape[:2])
        noise, keys = programs.draw(request.seeds, request.indices, shape)
        noise = noise if request.latents is None else jnp.asarray(request.latents)
        noise, conds, keys = self._rows((noise, conds, keys))
        out = self.sample(networks, noise, conds, table, keys)
        if request.output_type != "latent":
            vae = self.components["vae"]
            out = self.run(vae, programs.decode, out, size=size, tile=self.vae_tile)
        out = np.asarray(out, np.float32)[: request.batch]
        requests.check_finite(out, request)
        scheduler = self.scheduler["_class_name"]
        parameters = requests.parameters(request, size, scheduler, self.class_name)
        if request.style is not None:
            parameters = [row | {"style_scale": request.style.scale} for row in parameters]
        if control is not None:
            parameters = [row | control.parameters for row in parameters]
        if self.experts:
            used = {"experts": [expert.entry for expert in self.experts]}
            parameters = [row | used for row in parameters]
        if request.output_type == "latent":
            return Result(out, parameters)
        out = np.clip(out, 0.0, 1.0)
        return Result(out if request.output_type == "np" else pictures.to_pil(out), parameters)

    def sample(self, networks, noise, conds, table, keys):
        """Latents [B,h,w,C]; `networks` and `conds` are one a denoiser, lowest noise first."""
        if len(networks) == 1:
            return self.run(networks[0], programs.denoise, noise, conds[0], table, keys)
        modules, params = zip(*networks, strict=True)
        if self.offload is None:
            return programs.denoise(modules, params, noise, conds, table, keys)
        return sampling.sample_from_host(
            programs.guided(modules), params, noise, conds, table, key=keys
        )

    def run(self, network, program, *args, **static):
        """`program(module, params, *args, **static)` of a network (module, params)."""
        module, params = network
        if self.offload is None:
            return program(module, params, *args, **static)
        return offload.run(program, module, params, *args, **static)

    @property
    def styled(self):
        """Whether a call takes a reference picture."""
        return self.style is not None

    def replace(self, control=None, lora=None, experts=None, scheduler=None, style=None):
        """Another pipeline that shares this one's arrays and compiled programs.

        Args:
            scheduler: as in `load_pipeline`.
            control, lora: as in `load_pipeline`; an empty list takes them off. A ControlNet-XS
                follows the computation of the one before it, unless a `Controller` names another.
            experts, style: as in `load_pipeline`; an empty list takes them off.
        """
        config = self.scheduler if scheduler is None else override(self.scheduler, scheduler)
        solvers.from_config(config, 1)  # an unusable scheduler is found now, not at the first call
        controllers, compat = self.controllers, self.compat
        if control is not None:
            dtype = self.components[self.denoiser].module.dtype
            parts = {"mesh": self.mesh, "offload": self.offload}
            controllers = controls.open_controllers(control, dtype, compat, **parts)
            compat = controls.compat_of(controllers, compat)
        pipe = dataclasses.replace(self, scheduler=config, controllers=controllers, compat=compat)
        if style is not None:
            pipe = pipe.with_style(style)
        if experts is not None:
            pipe = dataclasses.replace(pipe, experts=ensembles.open_for(pipe, experts))
        pipe = pipe if lora is None else pipe.adapted(lora)
        pipe.check()
        return pipe

    def adapted(self, given):
        """The same with these LoRA adapters, and no others, merged into the denoiser."""
        module, params = self.components[self.denoiser]
        plain = params if self.plain is None else self.plain
        trees, scales = adapters.open_adapters(given, plain, self.denoiser)
        merged = adapters.merged(plain, trees, scales) if trees else plain
        components = {**self.components, self.denoiser: Component(module, merged)}
        return dataclasses.replace(self, components=components, plain=plain if trees else None)

    def with_style(self, given):
        """The same with this reader of reference pictures, or without one."""
        found = styles.open_style(given, self.mesh, self.offload)
        if found is not None and self.style_reader is None:
            requests.refuse_parts(self.class_name, style=given)
        if found is not None:
            encoder = self.components[self.style_reader].module
            styles.check(found, encoder, min(length for _, length in self.contexts()))
        return dataclasses.replace(self, style=found)

    @classmethod
    def read(cls, directory, dtype, compat=None, lora=None, experts=None, style=None, **parts):
        """The pipeline in a diffusers directory."""
        if lora is not None:
            adapters.check(lora)
        experts = ensembles.check_entries(experts)
        pipe = cls(*diffusers_layout.read(cls, directory, dtype, compat, **parts))
        pipe = pipe if lora is None else pipe.adapted(lora)
        pipe = pipe if style is None else pipe.with_style(style)
        pipe = dataclasses.replace(pipe, experts=ensembles.open_for(pipe, experts))
        pipe.check()
        return pipe

    def write(self, directory, dtype=None):
        """Writes diffusers' layout; ConfigError where it has none."""
        if self.experts:
            fix = "save it with `pipe.replace(experts=[])`, and each expert on its own"
            raise ConfigError("diffusers has no layout of experts", "save_pipeline", fix)
        if self.style is not None:
            fix = "save it with `pipe.replace(style=[])`; the style's directory stays as it is"
            raise ConfigError("diffusers has no layout of style words", "save_pipeline", fix)
        diffusers_layout.write(self, directory, dtype)

    def check(self):
        """Raises ConfigError where components or controllers do not belong together."""
        controls.attach(self.components[self.denoiser], self.controllers)
        expert_fit.check(self, self.experts)

    def defaults(self):
        """(steps, guidance scale) of a call that names none."""
        return (4, 0.0) if is_lcm(self.scheduler) else (self.steps, self.guidance_scale)

    def option(self, name):
        """An entry of model_index.json that is no component."""
        return {**self.default_options, **self.options}[name]

    def table(self, steps):
        """The solver's table for this many steps, made on the host in float64."""
        return solvers.from_config(self.scheduler, steps)

    @property
    def factor(self):
        """Pixels a latent: the VAE's downsampling."""
        return self.components["vae"].module.downsample_factor

    @property
    def multiple(self):
        """What the sides in pixels must be multiples of, of the experts too."""
        own = self.factor * getattr(self.components[self.denoiser].module, "patch_size", 1)
        return math.lcm(own, *(expert.pipeline(self).multiple for expert in self.experts))

    def latent_shape(self, size):
        """(h, w, C) of the latents of one picture."""
        module = self.components[self.denoiser].module
        return (size[0] // self.factor, size[1] // self.factor, module.in_channels)

    def asked_size(self, height, width):
        """(H, W) of the result: the sides asked for, or the network's own."""
        own = latent_sides(self.components[self.denoiser].module.sample_size)
        if own is None and None in (height, width):
            what = "the network's config names no sample_size"
            raise ConfigError(what, "height, width", "give both")
        asked = (height, width)
        return tuple(own[i] * self.factor if n is None else n for i, n in enumerate(asked))

    def embeddings(self, given):
        """CLIP's embeddings [N,P] of a list of pictures, of a pipeline with a style."""
        return self.style.embeddings(styles.one_a_prompt(given, len(given)), self.run)

    def sizes(self, height, width):
        """((H, W) of the result, (H, W) that the network draws) for the sides asked for."""
        size, multiple = self.asked_size(height, width), self.multiple
        for name, side in zip(("height", "width"), size, strict=True):
            check_side(name, side, multiple)
        return size, size

    def encode(self, request, size):
        """The condition (DESIGN section 2), one row an image. Families say how."""
        raise NotImplementedError

    def contexts(self):
        """[(tokenizer, length)] of the tokens that the denoiser attends to, for painted words."""
        return [(self.tokenizer, self.max_tokens)]

    def clean(self, text):
        """A text as it is tokenised."""
        return text

    def condition(self, request, control, size, latent_size):
        """The family's condition with painted words and control added."""
        taken = 0 if self.style is None or request.style is None else self.style.count
        words, null = self._words(request, latent_size, taken)
        if control is not None:  # before any text is encoded: a picture may be refused
            words |= controls.condition(control, self.controllers, latent_size, self, request)
        cond = self.encode(request, size) | words
        if "null" in cond:
            cond["null"] = cond["null"] | null
        if "unstyled" in cond:  # other tokens count there, and more of a long prompt are read
            cond["unstyled"] |= self._words(request, latent_size)[0]
        return cond

    def _words(self, request, latent_size, taken=0):
        """(condition, its unconditional part) of painted words; empty where nothing is painted.

        `taken`: how many tokens the style's words take of those that are read.
        """
        if request.word_masks is None:
            return {}, {}
        prompts = [self.clean(text) for text in request.prompts]
        contexts = [(tokenizer, length - taken) for tokenizer, length in self.contexts()]
        words, null = word_condition(contexts, prompts, request.word_masks, latent_size)
        found = (styles.counted(words, taken) if taken else words), null
        if not found[0]["word_mask"].any():
            return {}, {}
        return tuple(programs.repeated(part, request.repeats) for part in found)

    def _rows(self, tree):
        return programs.over(self.mesh, tree)

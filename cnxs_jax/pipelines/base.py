"""The one pipeline: text -> condition -> latents -> pictures, the same for every model family.

A family (pixart.py) says which components it has, its defaults, its sizes and how texts become a
condition. The programs below are jitted at module level with the network as a static argument, so
pipelines that share a network share its compiled programs; seed, texts, guidance scale and every
column of the solver's table are traced.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.diffusion import guidance, sampling, solvers
from cnxs_jax.errors import ConfigError, NumericsError
from cnxs_jax.pipelines import images as pictures
from cnxs_jax.pipelines import request as requests
from cnxs_jax.pipelines.scheduler import is_lcm, override
from cnxs_jax.pipelines.sizes import check_side, resize_and_crop

# Arguments of `__call__` that need a part that no pipeline of this family has, and their defaults.
_CONTROL = {
    "image": None,
    "controlnet_conditioning_scale": 1.0,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
    "word_masks": None,
    "style_image": None,
    "style_scale": None,
}


class Component(NamedTuple):
    """A network and its parameters."""

    module: Any
    params: Any


class Result(NamedTuple):
    """`images` (see `output_type`) and, for each image, the `parameters` that draw it again."""

    images: Any
    parameters: list


@functools.partial(jax.jit, static_argnames=("shape",))
def draw(seeds_B, indices_B, shape):
    """Standard normal noise [B, *shape] and one sampling key an image, from seed and index alone.

    Image n's key is fold_in(key(seed), index), so a picture does not depend on its batch.
    """

    def one(seed, index):
        noise_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
        return jax.random.normal(noise_key, shape), step_key

    return jax.vmap(one)(seeds_B, indices_B)


@functools.partial(jax.jit, static_argnames=("module",))
def denoise(module, params, noise, cond, table, keys):
    """Latents [B,h,w,C] from standard normal noise: one program a static signature."""
    step = guidance.cfg(sampling.denoiser(module))
    return sampling.sample(step, params, noise, cond, table, key=keys)


@functools.partial(jax.jit, static_argnames=("module", "size"))
def decode(module, params, latents, size):
    """Pictures [B,H,W,3] around [0,1], not clamped, of scaled latents; `size` = (H, W)."""
    latents = latents / module.scaling_factor + (module.shift_factor or 0.0)
    image = module.apply({"params": params}, latents, method="decode")
    return resize_and_crop(image.astype(jnp.float32) * 0.5 + 0.5, *size)


@functools.partial(jax.jit, static_argnames=("module",))
def encode_text(module, params, ids, mask):
    """What the text encoder makes of ids [B,L] and mask [B,L]."""
    return module.apply({"params": params}, ids, mask)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Text to image. Made by `load_pipeline`; `pipe(prompt, ...)` draws.

    Attributes:
        components: {name: Component}, diffusers' names.
        tokenizer: turns texts into ids and a mask on the host.
        scheduler: a diffusers scheduler config (with `_class_name`).
        null_text: [L,D] learned unconditional caption, or None for the empty prompt.
        mesh: devices that share parameters and batch, or None for one device.
    """

    components: dict
    tokenizer: Any
    scheduler: dict
    null_text: Any = None
    mesh: Any = None

    class_name: ClassVar[str]  # diffusers' name of the family
    classes: ClassVar[dict]  # {directory: (library, class)} of model_index.json
    networks: ClassVar[tuple]  # the directories that hold networks
    denoiser: ClassVar[str]  # the one that samples
    sharding_rules: ClassVar[dict]  # {network: rules}
    steps: ClassVar[int] = 20
    guidance_scale: ClassVar[float] = 7.5

    def __call__(
        self,
        prompt,
        negative_prompt=None,
        image=None,
        num_inference_steps=None,
        guidance_scale=None,
        controlnet_conditioning_scale=1.0,
        control_guidance_start=0.0,
        control_guidance_end=1.0,
        word_masks=None,
        style_image=None,
        style_scale=None,
        height=None,
        width=None,
        num_images_per_prompt=1,
        seed=0,
        latents=None,
        output_type="pil",
    ):
        """Draws pictures.

        Args:
            prompt: a text or a list of texts, at most 2000 characters each; "" is unconditional.
            negative_prompt: a text, or one a prompt, that takes the unconditional half's place.
            image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end,
            word_masks, style_image, style_scale: need a controller or an expert ensemble.
            num_inference_steps: rows of the solver; the family's default, 4 with LCM.
            guidance_scale: w of eps_u + w (eps_c - eps_u) (Imagen, equation 2), off if w <= 1;
                the family's default, 0 with LCM.
            height, width: pixels.
            num_images_per_prompt: images of one prompt are neighbours in the result.
            seed: a number: image n uses fold_in(key(seed), n). A list has one entry an image:
                a number s stands for fold_in(key(s), 0), the first image of seed s, and a pair
                (s, n) for its image n. So a picture does not depend on its batch.
            latents: [B,h,w,C] standard normal noise to start from instead of the seed's.
            output_type: "pil" list, "np" float32 [B,H,W,3] in [0,1], "latent" [B,h,w,C].

        Returns:
            Result with `images` and `parameters`.

        Raises:
            ConfigError: a bad argument, before any device work.
            NumericsError: the networks' output is not finite.
        """
        given = locals()
        requests.refuse_unused(
            {name: given[name] for name in _CONTROL},
            _CONTROL,
            "this pipeline was loaded without a controller or expert ensemble",
        )
        few = is_lcm(self.scheduler)
        defaults = (4, 0.0) if few else (self.steps, self.guidance_scale)
        request = requests.check(
            prompt=prompt,
            negative_prompt=negative_prompt,
            steps=defaults[0] if num_inference_steps is None else num_inference_steps,
            guidance=defaults[1] if guidance_scale is None else guidance_scale,
            height=height,
            width=width,
            repeats=num_images_per_prompt,
            seed=seed,
            latents=latents,
            output_type=output_type,
        )
        return self._draw(request)

    def _draw(self, request):
        size, drawn = self.sizes(request.height, request.width)
        shape = self.latent_shape(drawn)
        if request.latents is not None and request.latents.shape[1:] != shape:
            raise ConfigError(
                f"expected [{request.batch},{','.join(map(str, shape))}], "
                f"got {list(request.latents.shape)}",
                "latents",
            )
        table = self.table(request.steps)
        cond = self.encode(request, drawn)
        noise, keys = draw(request.seeds, request.indices, shape)
        noise = noise if request.latents is None else jnp.asarray(request.latents)
        network = self.components[self.denoiser]
        out = denoise(*network, *self._rows((noise, cond)), table, self._rows(keys))
        if request.output_type != "latent":
            out = decode(*self.components["vae"], out, size)
        out = np.asarray(out, np.float32)[: request.batch]
        check_finite(out, request)
        parameters = self._parameters(request, size)
        if request.output_type == "latent":
            return Result(out, parameters)
        out = np.clip(out, 0.0, 1.0)
        return Result(out if request.output_type == "np" else pictures.to_pil(out), parameters)

    def replace(self, control=None, lora=None, experts=None, scheduler=None):
        """Another pipeline that shares this one's arrays and compiled programs.

        Args:
            scheduler: as in `load_pipeline`.
            control, lora, experts: parts that this family cannot take yet raise ConfigError.
        """
        refuse_parts(self.class_name, control=control, lora=lora, experts=experts)
        config = self.scheduler if scheduler is None else override(self.scheduler, scheduler)
        solvers.from_config(config, 1)  # an unusable scheduler is found now, not at the first call
        return dataclasses.replace(self, scheduler=config)

    def table(self, steps):
        """The solver's table for this many steps, made on the host in float64."""
        return solvers.from_config(self.scheduler, steps)

    @property
    def factor(self):
        """Pixels a latent: the VAE's downsampling."""
        return self.components["vae"].module.downsample_factor

    def latent_shape(self, size):
        """(h, w, C) of the latents of one picture."""
        module = self.components[self.denoiser].module
        return (size[0] // self.factor, size[1] // self.factor, module.in_channels)

    def asked_size(self, height, width):
        """(H, W) of the result: the sides asked for, or the network's own."""
        own = self.components[self.denoiser].module.sample_size * self.factor
        return (own if height is None else height, own if width is None else width)

    def sizes(self, height, width):
        """((H, W) of the result, (H, W) that the network draws) for the sides asked for."""
        size = self.asked_size(height, width)
        multiple = self.factor * getattr(self.components[self.denoiser].module, "patch_size", 1)
        for name, side in zip(("height", "width"), size, strict=True):
            check_side(name, side, multiple)
        return size, size

    def encode(self, request, size):
        """The condition (DESIGN section 2), one row an image. Families say how."""
        raise NotImplementedError

    def _rows(self, tree):
        """Rows repeated up to a multiple of the mesh's batch parts, and split over them.

        Padding is safe because a picture does not depend on its batch; the caller drops it.
        """
        if self.mesh is None:
            return tree
        from cnxs_jax import sharding

        parts = sharding.batch_parts(self.mesh)

        def place(x):
            missing = -x.shape[0] % parts
            x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
            return jax.device_put(x, sharding.batch_sharding(self.mesh))

        return jax.tree.map(place, tree)

    def _parameters(self, request, size):
        rows = []
        for n in range(request.batch):
            text = n // request.repeats
            rows.append(
                {
                    "prompt": request.prompts[text],
                    "negative_prompt": request.negatives and request.negatives[text],
                    "seed": int(request.seeds[n]),
                    "index": int(request.indices[n]),
                    "latents_given": request.latents is not None,
                    "steps": request.steps,
                    "guidance": request.guidance,
                    "scheduler": self.scheduler["_class_name"],
                    "height": size[0],
                    "width": size[1],
                    "pipeline": self.class_name,
                }
            )
        return rows


def check_finite(out, request):
    """Before clamping: a clamp would turn NaN into a black picture."""
    bad = [n for n in range(len(out)) if not np.isfinite(out[n]).all()]
    if bad:
        raise NumericsError(
            f"images {bad[:8]} of {request.batch} are not finite",
            f"seed {request.seeds[bad[0]]}, guidance {request.guidance}",
            "try dtype='float32' or a smaller guidance scale, and check the weights",
        )


def refuse_parts(class_name, **parts):
    """Raises ConfigError for a controller, LoRA or expert that a family cannot take."""
    for name, part in parts.items():
        if part is not None:
            raise ConfigError(
                f"{class_name} takes no `{name}` in this version",
                name,
                "it supports `scheduler`, `dtype` and `mesh`",
            )

"""One call's arguments, checked and normalised before any device work."""

import dataclasses
import numbers
import sys
from typing import Any

import numpy as np

from cnxs_jax.errors import ConfigError, NumericsError, did_you_mean
from cnxs_jax.pipelines.sizes import check_side

MAX_PROMPT = 2000  # characters; caption cleaning is quadratic in them
MAX_STEPS = 1000
MAX_BATCH = 4096
OUTPUT_TYPES = ("pil", "np", "latent")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to draw. One row an image: images of one prompt are neighbours.

    Attributes:
        prompts, negatives: one text a prompt (negatives may be None).
        repeats: images per prompt; `batch` = len(prompts) * repeats.
        steps, guidance: network evaluations and guidance scale w of eps_u + w (eps_c - eps_u).
        height, width: pixels asked for, None for the model's own.
        seeds, indices: uint32 [batch]; image n is drawn from fold_in(key(seeds[n]), indices[n]).
        latents: float32 [batch,h,w,C] standard normal noise to start from, or None to draw it.
        output_type: pil, np or latent.
        word_masks: None, or one dict of painted phrases a prompt.
        style: None, or the reference pictures (`pipelines.style.Reference`).
    """

    prompts: list
    negatives: list | None
    repeats: int
    steps: int
    guidance: float
    height: int | None
    width: int | None
    seeds: np.ndarray
    indices: np.ndarray
    latents: np.ndarray | None
    output_type: str
    word_masks: list | None = None
    style: Any = None

    @property
    def batch(self):
        """Number of images."""
        return len(self.prompts) * self.repeats

    @property
    def guided(self):
        """Whether the unconditional half is evaluated at all, as in diffusers: w > 1."""
        return self.guidance > 1.0


def check(
    prompt,
    negative_prompt,
    steps,
    guidance,
    height,
    width,
    repeats,
    seed,
    latents,
    output_type,
    word_masks=None,
):
    """The Request of a call; raises ConfigError for what no model could draw."""
    prompts = _texts(prompt, "prompt")
    count = _integer(repeats, "num_images_per_prompt", 1, MAX_BATCH)
    batch = len(prompts) * count
    if batch > MAX_BATCH:
        raise ConfigError(f"{batch} images in one call, at most {MAX_BATCH}", "prompt")
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(
            f"unknown output type {output_type!r}.{did_you_mean(output_type, OUTPUT_TYPES)}",
            "output_type",
            f"one of {', '.join(OUTPUT_TYPES)}",
        )
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_side(name, side)
    seeds, indices = _seeds(seed, batch)
    return Request(
        prompts=prompts,
        negatives=_negatives(negative_prompt, len(prompts)),
        repeats=count,
        steps=_integer(steps, "num_inference_steps", 1, MAX_STEPS),
        guidance=guidance_scale(guidance),
        height=height,
        width=width,
        seeds=seeds,
        indices=indices,
        latents=None if latents is None else _latents(latents, batch),
        output_type=output_type,
        word_masks=_word_masks(word_masks, len(prompts)),
    )


def refuse_unused(arguments, defaults, why):
    """Raises ConfigError naming the first argument that differs from its default."""
    for name, value in arguments.items():
        default = defaults[name]
        if value is default or (isinstance(value, (int, float)) and value == default):
            continue
        raise ConfigError(f"`{name}` has no effect here: {why}", name, "leave it out")


def refuse_parts(class_name, **parts):
    """Raises ConfigError for a part that a family cannot take."""
    for name, part in parts.items():
        if part is not None:
            raise ConfigError(
                f"{class_name} takes no `{name}` in this version",
                name,
                "leave it out",
            )


def parameters(request, size, scheduler, pipeline):
    """What draws each image again, one dict an image; `size` = (H, W) of the result."""
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
                "scheduler": scheduler,
                "height": size[0],
                "width": size[1],
                "pipeline": pipeline,
            }
        )
    return rows


def check_finite(out, request):
    """Raises NumericsError; before clamping, which would turn NaN into a black picture."""
    bad = [n for n in range(len(out)) if not np.isfinite(out[n]).all()]
    if bad:
        raise NumericsError(
            f"images {bad[:8]} of {request.batch} are not finite",
            f"seed {request.seeds[bad[0]]}, guidance {request.guidance}",
            "try dtype='float32' or a smaller guidance scale, and check the weights",
        )


def _texts(texts, name):
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)):
        raise ConfigError(f"expected a text or a list of texts, got {type(texts).__name__}", name)
    if not texts:
        raise ConfigError("the list is empty", name, "give at least one text")
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"entry {n} is a {type(text).__name__}, expected a text", name)
        if len(text) > MAX_PROMPT:
            raise ConfigError(
                f"entry {n} has {len(text)} characters, at most {MAX_PROMPT}", name, "shorten it"
            )
    return list(texts)


def _negatives(negative, count):
    if negative is None:
        return None
    texts = _texts(negative, "negative_prompt")
    if isinstance(negative, str):
        return texts * count
    if len(texts) != count:
        raise ConfigError(
            f"{len(texts)} negative prompts for {count} prompts",
            "negative_prompt",
            "give one text for all of them or one a prompt",
        )
    return texts


def _word_masks(masks, count):
    """One dict a prompt, or None where there is nothing to paint."""
    rows = masks if isinstance(masks, list | tuple) else [masks] * count
    if len(rows) != count:
        raise ConfigError(
            f"{len(rows)} sets of masks for {count} prompts",
            "word_masks",
            "give one dict for all of them or one a prompt",
        )
    for row in rows:
        if row is not None and not isinstance(row, dict):
            what = f"expected a dict of phrases and masks, got {type(row).__name__}"
            raise ConfigError(what, "word_masks")
    return [row or {} for row in rows] if any(rows) else None


def _integer(value, name, low, high):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"expected a whole number, got {value!r}", name)
    if not low <= value <= high:
        raise ConfigError(f"expected {low} to {high}, got {value}", name)
    return int(value)


def guidance_scale(value, where="guidance_scale"):
    """The number; ConfigError for what is none."""
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not ok or not 0 <= value <= sys.float_info.max:  # an integer may be larger than any float
        raise ConfigError(f"expected a number of 0 or more, got {value!r}", where)
    return float(value)


def _seeds(seed, batch):
    """uint32 seeds and indices, one an image."""
    if not isinstance(seed, (list, tuple)):
        pairs = [(seed, n) for n in range(batch)]
    else:
        pairs = [s if isinstance(s, (list, tuple)) and len(s) == 2 else (s, 0) for s in seed]
        if len(pairs) != batch:
            raise ConfigError(
                f"{len(pairs)} seeds for {batch} images", "seed", "give one number or one an image"
            )
    limit = 2**32 - 1
    checked = [(_integer(s, "seed", 0, limit), _integer(n, "seed", 0, limit)) for s, n in pairs]
    seeds, indices = np.array(checked, np.uint32).T
    return seeds, indices


def _latents(latents, batch):
    try:
        latents = np.asarray(latents, np.float32)
    except (TypeError, ValueError):
        raise ConfigError("expected an array [B,h,w,C]", "latents") from None
    if latents.ndim != 4 or latents.shape[0] != batch:
        raise ConfigError(f"expected [{batch},h,w,C], got {list(latents.shape)}", "latents")
    if not np.isfinite(latents).all():
        raise ConfigError("the latents are not all finite", "latents")
    return latents

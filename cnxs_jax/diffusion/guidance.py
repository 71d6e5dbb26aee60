"""Classifier-free guidance as a wrapper of a denoiser (Ho and Salimans 2022, arXiv 2207.12598)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from cnxs_jax.diffusion.prediction import mean_channels
from cnxs_jax.diffusion.sampling import prepare
from cnxs_jax.diffusion.schedule import expand
from cnxs_jax.errors import ConfigError

# What the sampling loop rewrites at each row, so what `prepare` may not freeze.
ROW_KEYS = ("sigma", "control_scale", "control_active")


@dataclass(frozen=True)
class Guided:
    """`uncond + scale * (cond - uncond)`, both halves evaluated in one batch of 2B.

    Reads `cond["null"]` (only the keys that differ when unconditional) and
    `cond["guidance_scale"] [B]`; without `null` it is the plain denoiser.
    """

    denoise: Any

    def __call__(self, params, x, t, cond):
        """Guided prediction, float32 `[B, H, W, C]`; the plain raw output without `null`."""
        inner = {k: v for k, v in cond.items() if k not in ("null", "guidance_scale", "pair")}
        if "null" not in cond:
            return self.denoise(params, x, t, inner)
        _check(cond)
        if "pair" in cond:
            rows = {k: inner[k] for k in ROW_KEYS if k in inner}
            null = {k: v for k, v in cond["null"].items() if k in ROW_KEYS}
            both = {**cond["pair"], **pair(rows, null)}
        else:
            both = pair(inner, cond["null"])
        out = self.denoise(params, _twice(x), _twice(t), both)
        conditional, unconditional = jnp.split(mean_channels(out, x), 2)
        scale = expand(cond["guidance_scale"].astype(jnp.float32), x)
        return unconditional + scale * (conditional - unconditional)

    def prepare(self, params, cond):
        """Prepares both halves at once; the result is kept, doubled, under `pair`."""
        if "null" not in cond:
            return prepare(self.denoise, params, cond)
        _check(cond)
        inner = {k: v for k, v in cond.items() if k not in ("null", "guidance_scale")}
        both = prepare(self.denoise, params, pair(inner, cond["null"]))
        kept = {k: v for k, v in cond.items() if k in (*ROW_KEYS, "guidance_scale")}
        null = {k: v for k, v in cond["null"].items() if k in ROW_KEYS}
        return {**kept, "null": null, "pair": both}


def cfg(denoise):
    """Classifier-free guidance around `denoise`; see `Guided`."""
    return Guided(denoise)


@dataclass(frozen=True)
class Styled:
    """Guidance to a text and, with a weight of its own, to a reference image's style.

    `u + scale (c - u) + style_scale (s - c)`: u sees nothing, c the text, s text and style (as
    InstructPix2Pix weighs its two conditions, arXiv 2211.09800, equation 3); three evaluations in
    one batch. `cond` is that of s; `cond["unstyled"]` holds the keys that differ for c, `null`
    those that differ further for u; `style_scale [B]`. Without `unstyled` it is `Guided`.
    """

    denoise: Any

    def __call__(self, params, x, t, cond):
        """Guided prediction, float32 `[B, H, W, C]`."""
        if "unstyled" not in cond:
            return Guided(self.denoise)(params, x, t, cond)
        own = ("null", "guidance_scale", "unstyled", "style_scale")
        inner = {k: v for k, v in cond.items() if k not in own}
        if "null" not in cond:  # a row without guidance
            return self.denoise(params, x, t, inner)
        for name in ("guidance_scale", "style_scale"):
            _check(cond, name)
        _known(inner, cond["unstyled"], "unstyled")
        halves = pair({**inner, **cond["unstyled"]}, cond["null"])
        three = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), inner, halves)
        out = self.denoise(params, jnp.tile(x, (3, 1, 1, 1)), jnp.tile(t, 3), three)
        styled, text, nothing = jnp.split(mean_channels(out, x), 3)
        scale, weight = (
            expand(cond[name].astype(jnp.float32), x) for name in ("guidance_scale", "style_scale")
        )
        return nothing + scale * (text - nothing) + weight * (styled - text)

    def prepare(self, params, cond):
        """As `Guided`; three evaluations are not prepared."""
        return cond if "unstyled" in cond else Guided(self.denoise).prepare(params, cond)


def styled(denoise):
    """Guidance to text and style around `denoise`; see `Styled`."""
    return Styled(denoise)


def pair(cond, null):
    """`[2B, ...]`: the conditional batch, then the same with the keys of `null` replaced."""
    _known(cond, null, "null")
    other = {**cond, **null}
    for key in cond:
        if any(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves((cond[key], other[key]))):
            what = "one number for all images has no batch to double"
            raise ConfigError(what, f'cond["{key}"]', "give an array [B]")
    batch = max((leaf.shape[0] for leaf in jax.tree.leaves((cond, other))), default=1)

    def rows(leaf):  # one serves all
        one = leaf.shape[0] == 1
        return jnp.broadcast_to(leaf, (batch, *leaf.shape[1:])) if one else jnp.asarray(leaf)

    both = lambda a, b: jnp.concatenate([rows(a), rows(b)])  # noqa: E731
    return jax.tree.map(both, dict(cond), other)


def scale_of_omega(omega):
    """The guidance scale that equals `(1 + omega) cond - omega uncond`.

    LCM and PixArt-delta state their guidance as omega (arXiv 2310.04378, eq. 7): omega = 4.5 is
    the guidance scale 5.5.
    """
    return 1.0 + omega


def dynamic_threshold(ratio=0.995, max_value=float("inf")):
    """`post` for `sample`: Imagen's dynamic thresholding (arXiv 2205.11487, section 2.3).

    x0 is clipped at the `ratio` quantile of each image's absolute values, or at 1 or `max_value`
    if that lies outside [1, max_value], and divided by the limit. For pixel models in [-1, 1]; a
    latent has no such range.
    """

    def post(x0):
        flat = jnp.abs(x0).reshape(x0.shape[0], -1)
        limit = jnp.clip(jnp.quantile(flat, ratio, axis=1), 1.0, max_value)
        limit = expand(limit, x0)
        return jnp.clip(x0, -limit, limit) / limit

    return post


def _known(cond, changes, name):
    unknown = sorted(set(changes) - set(cond))
    if unknown:
        raise ConfigError(
            f"{name} has keys that the condition lacks: {', '.join(unknown)}", f'cond["{name}"]'
        )


def _check(cond, name="guidance_scale"):
    if name not in cond:
        raise ConfigError(
            "guidance needs a scale per image", f'cond["{name}"]', "give an array [B]"
        )


def _twice(value):
    return jnp.concatenate([value, value])

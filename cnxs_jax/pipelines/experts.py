"""Experts of a pipeline: other denoisers that take over below some noise, on the same latents.

So SDXL's base and refiner work (arXiv 2307.01952, section 2.5), two-stage PixArt checkpoints, and
ensembles (eDiff-I, arXiv 2211.01324). An expert may be of another architecture, read other texts
and be guided and controlled in its own way; latents, noise schedule and prediction are shared. The
solver is the pipeline's, and its history goes on across the switch.

They are given to `load_pipeline` as a list of dicts, or as a JSON file of one:

  below           the expert runs at training times t below this (1000 is pure noise): `1000 * (1 -
                  denoising_end)` of diffusers' two-stage SDXL, and down to the next one's
  model           a pipeline (directory, hub id, or one that is loaded) with texts of its own; or a
                  denoiser alone (directory or file, or (module, params)) that shares all the rest
  guidance_scale  its own; the call's unless given
  control         its controllers, as `load_pipeline` takes them; unless given, a denoiser alone has
                  the pipeline's and a pipeline its own. They see the pipeline's control pictures.
"""

import dataclasses
import json
import math
import numbers
import os
import pathlib
from typing import Any

import numpy as np

from cnxs_jax.diffusion import experts as routing
from cnxs_jax.diffusion import schedule
from cnxs_jax.errors import ConfigError, did_you_mean
from cnxs_jax.pipelines import control as controls
from cnxs_jax.pipelines import request as requests
from cnxs_jax.pipelines.diffusers_layout import INDEX
from cnxs_jax.pipelines.interface import Component, TextToImage
from cnxs_jax.pipelines.load import place, read_model

KEYS = ("below", "model", "guidance_scale", "control")


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert of a pipeline.

    Attributes:
        below: the training time under which it runs.
        pipe: a pipeline of its own, or None.
        denoiser: where it has none: a `Component` in the place of the pipeline's.
        guidance: its own guidance scale, or None for the call's.
        controllers: its own, or None for those of `pipe`, or of the pipeline.
    """

    below: float
    pipe: Any = None
    denoiser: Component | None = None
    guidance: float | None = None
    controllers: tuple | None = None

    def pipeline(self, main):
        """What draws with this expert alone."""
        pipe = self.pipe
        if pipe is None:
            components = {**main.components, main.denoiser: self.denoiser}
            pipe = dataclasses.replace(main, components=components, experts=())
        if self.controllers is None:
            return pipe
        return dataclasses.replace(pipe, controllers=self.controllers)


def open_experts(given, dtype=None, mesh=None, offload=None):
    """A tuple of `Expert`, lowest noise first.

    Args:
        given: None, a list of dicts or of `Expert`, or the path of a JSON file with such a list.
        dtype, mesh, offload: of the pipeline that they belong to.

    Raises:
        ConfigError: something else.
        CheckpointError: files that are missing or damaged.
    """
    entries, folder = ([], None) if given is None else _entries(given)
    parts = {"dtype": dtype, "mesh": mesh, "offload": offload}
    found = [e if isinstance(e, Expert) else _open(e, folder, parts) for e in entries]
    return tuple(sorted(found, key=lambda expert: expert.below))


def _entries(given):
    """(list, folder that paths in it are relative to)."""
    folder = None
    if isinstance(given, str | os.PathLike):
        path = pathlib.Path(given)
        try:
            given, folder = json.loads(path.read_text(encoding="utf-8")), path.parent
        except FileNotFoundError:
            raise ConfigError("there is no such file", str(path), "give a JSON file") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"not a readable JSON file: {error}", str(path)) from None
    if not isinstance(given, list | tuple):
        what = f"expected a list of dicts, got {type(given).__name__}"
        raise ConfigError(what, "experts", '[{"below": 200, "model": "sdxl-refiner"}]')
    return given, folder


def _open(entry, folder, parts):
    """The `Expert` of one dict."""
    if not isinstance(entry, dict):
        what = f"expected a dict, got {type(entry).__name__}"
        raise ConfigError(what, "experts", '{"below": 200, "model": "sdxl-refiner"}')
    for name in entry:
        if name not in KEYS:
            fix = f"there are {', '.join(KEYS)}"
            raise ConfigError(f"no key {name!r}.{did_you_mean(name, KEYS)}", "experts", fix)
    for name in ("below", "model"):
        if name not in entry:
            raise ConfigError(f"`{name}` is missing", "experts", f"got {', '.join(entry)}")
    guidance = entry.get("guidance_scale")
    if guidance is not None:
        guidance = requests.guidance_scale(guidance, "experts: guidance_scale")
    pipe, denoiser = _model(_relative(entry["model"], folder), **parts)
    control = entry.get("control")
    if isinstance(control, list):
        control = [_relative(one, folder) for one in control]
    opened = controls.open_controllers(_relative(control, folder), **parts)
    own = None if control is None else opened
    return Expert(_below(entry["below"]), pipe, denoiser, guidance, own)


def _relative(path, folder):
    """A path of a file in `folder` as seen from here; a hub id, or anything else, as it is."""
    if folder is None or not isinstance(path, str) or not (folder / path).exists():
        return path
    return str(folder / path)


def _below(value):
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not good or not math.isfinite(value):
        raise ConfigError(
            f"expected a training time, got {value!r}", "experts: below", "such as 200"
        )
    return float(value)


def _model(given, dtype, mesh, offload):
    """(pipeline, None) or (None, denoiser)."""
    from cnxs_jax.pipelines.pipeline import load_pipeline

    if isinstance(given, TextToImage):
        return given, None
    if isinstance(given, tuple):
        module, params = controls.of_pair(given)[:2]
        return None, Component(module, params)
    if not isinstance(given, str | os.PathLike):
        what = f"expected a path, a pipeline or (module, params), got {type(given).__name__}"
        raise ConfigError(what, "experts: model")
    path = pathlib.Path(given)
    if path.is_dir() and not (path / INDEX).is_file() or path.is_file():
        module, params = read_model(path, dtype=dtype)
        return None, Component(module, params if offload else place(params, mesh))
    return load_pipeline(given, dtype=dtype, mesh=mesh, offload=offload), None


def check(main, experts):
    """Raises ConfigError for experts that do not fit `main` or each other."""
    own = schedule.from_config(main.scheduler)
    times = [expert.below for expert in experts]
    for n, time in enumerate(times):
        if not 0 < time < own.num_train_timesteps:
            what = f"{time:g} is not between 0 and {own.num_train_timesteps}"
            raise ConfigError(what, "experts: below", "or one of the denoisers would never run")
        if time in times[:n]:
            raise ConfigError(f"two experts below {time:g}", "experts: below", "leave one out")
    for expert in experts:
        where = f"experts: below {expert.below:g}"
        pipe = expert.pipeline(main)
        for name in ("components", "experts", "offload", "mesh"):
            if not hasattr(pipe, name):
                raise ConfigError(f"a {pipe.class_name} cannot be an expert", where)
        if pipe.experts:
            raise ConfigError("an expert with experts of its own", where, "list them side by side")
        if expert.pipe is None:
            _check_denoiser(main, pipe, where)
        else:
            _check_pipeline(main, pipe, own, where)
        try:
            pipe.check()
        except ConfigError as error:
            raise ConfigError(error.what, f"{where}: {error.where}", error.fix) from None
        if pipe.latent_shape((64, 64)) != main.latent_shape((64, 64)):
            shapes = [p.latent_shape((64, 64)) for p in (pipe, main)]
            what = "latents {} of 64 px, the pipeline has {}".format(*shapes)
            raise ConfigError(what, where, "experts draw on the latents of one autoencoder")
        if pipe.controllers and len(pipe.controllers) != len(main.controllers):
            what = f"{len(pipe.controllers)} controllers, the pipeline has {len(main.controllers)}"
            raise ConfigError(what, where, "give as many to both, or none to the expert: []")


def _check_denoiser(main, pipe, where):
    own, given = (type(p.components[p.denoiser].module).__name__ for p in (main, pipe))
    if own != given:
        fix = "give its whole pipeline, with the texts that it reads"
        raise ConfigError(f"a {given} in the place of a {own}", where, fix)


def _check_pipeline(main, pipe, own, where):
    """Latents and noise must mean the same; where the networks lie must be the same, too."""
    for name in ("offload", "mesh"):
        if getattr(pipe, name) != getattr(main, name):
            what = f"its {name} is {getattr(pipe, name)}, the pipeline's {getattr(main, name)}"
            raise ConfigError(what, where, "load it as the pipeline, or give its path")
    other = schedule.from_config(pipe.scheduler)
    same = np.array_equal(own.alphas_cumprod, other.alphas_cumprod)
    if not same:
        raise ConfigError("another noise schedule than the pipeline's", where)
    kinds = [schedule.model_fields(p.scheduler)["prediction_type"] for p in (pipe, main)]
    if kinds[0] != kinds[1]:
        raise ConfigError("it predicts {}, the pipeline {}".format(*kinds), where)
    for name in ("scaling_factor", "shift_factor"):
        values = [getattr(p.components["vae"].module, name) for p in (pipe, main)]
        if values[0] != values[1]:
            what = "{} of its autoencoder is {}, the pipeline's {}".format(name, *values)
            raise ConfigError(what, where, "experts draw on the latents of one autoencoder")


def route(table, experts):
    """`table` with the expert column; the pipeline itself is the last one, of the highest noise."""
    return routing.route(table, [expert.below for expert in experts], by="t")


def members(main, request, control, size, latent_size):
    """`(networks, conditions)` of all that draw, lowest noise first, the pipeline last.

    Args:
        control: the call's `Control`, or None.
        size, latent_size: (H, W) that is drawn, and of its latents.
    """
    shown = main.condition(request, control, size, latent_size)
    networks, conds = [], []
    for expert in main.experts:
        pipe = expert.pipeline(main)
        networks.append(controls.attach(pipe.components[pipe.denoiser], pipe.controllers))
        if expert.guidance in (None, request.guidance) and _sees_the_same(pipe, main):
            conds.append(shown)
            continue
        guidance = request.guidance if expert.guidance is None else expert.guidance
        own, picture = dataclasses.replace(request, guidance=guidance), control
        conds.append(pipe.condition(own, picture if pipe.controllers else None, size, latent_size))
    networks.append(controls.attach(main.components[main.denoiser], main.controllers))
    return tuple(networks), (*conds, shown)


def _sees_the_same(pipe, main):
    """Whether the condition of `main` is that of `pipe`, too, and need not be made again."""
    own, other = (p.components[p.denoiser].module for p in (pipe, main))
    rest = all(
        pipe.components.get(n) is c for n, c in main.components.items() if n != main.denoiser
    )
    return rest and own == other and pipe.controllers is main.controllers

"""Experts of a pipeline: other denoisers that take over below some noise, on the same latents.

So SDXL's base and refiner work (arXiv 2307.01952, section 2.5), two-stage PixArt checkpoints, and
ensembles (eDiff-I, arXiv 2211.01324). An expert may be of another architecture, read other texts
and be guided and controlled in its own way; latents, noise schedule and prediction are shared. The
solver is the pipeline's, and its history goes on across the switch.

They are given to `load_pipeline` as a list of dicts, or as a JSON file of one, to whose folder the
paths in it are relative:

  below           the expert runs at training times t below this (1000 is pure noise): `1000 * (1 -
                  denoising_end)` of diffusers' two-stage SDXL, and down to the next one's
  model           a pipeline (directory, hub id, or one that is loaded) with texts of its own; or a
                  denoiser alone (directory or file, or (module, params)) that shares all the rest
  component       the denoiser of the directory, hub id or file that `model` names, alone
  guidance_scale  its own; the call's unless given
  control         its controllers, as `load_pipeline` takes them; unless given, a denoiser alone has
                  the pipeline's and a pipeline its own. They see the pipeline's control pictures.

LoRA adapters of the pipeline are merged into its own denoiser alone: an expert that is to have some
is a pipeline that was loaded with them.
"""

import dataclasses
import json
import math
import numbers
import os
import pathlib
import re
import warnings
from typing import Any

import jax

from cnxs_jax.diffusion import experts as routing
from cnxs_jax.errors import CnxsError, ConfigError, did_you_mean
from cnxs_jax.pipelines import control as controls
from cnxs_jax.pipelines import request as requests
from cnxs_jax.pipelines.diffusers_layout import INDEX, fitting_null
from cnxs_jax.pipelines.interface import Component, TextToImage
from cnxs_jax.pipelines.load import component_directory, load_null_caption, place, read_model

KEYS = ("below", "model", "component", "guidance_scale", "control")
EXAMPLE = '[{"below": 200, "model": "sdxl-refiner"}]'
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert of a pipeline.

    Attributes:
        below: the training time under which it runs.
        pipe: a pipeline of its own, or None.
        denoiser: where it has none: a `Component` in the place of the pipeline's.
        null_text: of that denoiser, if it came with a learned unconditional caption.
        guidance: its own guidance scale, or None for the call's.
        controllers: its own, or None for those of `pipe`, or of the pipeline.
        entry: what of its dict is no array: what `load_pipeline` takes again.
    """

    below: float
    pipe: Any = None
    denoiser: Component | None = None
    null_text: Any = None
    guidance: float | None = None
    controllers: tuple | None = None
    entry: dict = dataclasses.field(default_factory=dict)

    def pipeline(self, main):
        """What draws with this expert alone."""
        pipe = self.pipe
        if pipe is not None and main.style is not None and pipe.style is None:
            pipe = pipe.with_style(main.style)  # or the reference would be forgotten on the way
        if pipe is None:
            components = {**main.components, main.denoiser: self.denoiser}
            null = main.null_text if self.null_text is None else self.null_text
            pipe = dataclasses.replace(main, components=components, experts=(), null_text=null)
        if self.controllers is None:
            return pipe
        return dataclasses.replace(pipe, controllers=self.controllers)


class Entry(dict):
    """A checked dict of an expert."""


def check_entries(given):
    """A list of `Entry` or `Expert`; nothing is opened.

    Args:
        given: None, such a list or one of dicts, or the path of a JSON file with dicts.

    Raises:
        ConfigError: something else.
    """
    folder = None
    if isinstance(given, str | os.PathLike):
        path = pathlib.Path(given)
        try:
            given, folder = json.loads(path.read_text(encoding="utf-8")), path.parent
        except FileNotFoundError:
            what = "there is no such file of experts"
            raise ConfigError(what, str(path), f"a JSON file: {EXAMPLE}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"not a readable JSON file: {error}", str(path)) from None
    if not isinstance(given, list | tuple) and (given is not None or folder is not None):
        what = f"expected a list of dicts, got {type(given).__name__}"
        raise ConfigError(what, "experts", EXAMPLE)
    return [e if isinstance(e, Expert | Entry) else _entry(e, folder) for e in given or ()]


def _entry(entry, folder):
    """The `Entry` of one dict: its numbers checked, its paths as seen from here."""
    if not isinstance(entry, dict):
        what = f"expected a dict, got {type(entry).__name__}"
        raise ConfigError(what, "experts", EXAMPLE)
    for name in entry:
        if name not in KEYS:
            fix = f"there are {', '.join(KEYS)}"
            raise ConfigError(f"no key {name!r}.{did_you_mean(name, KEYS)}", "experts", fix)
    for name in ("below", "model"):
        if entry.get(name) is None:
            there = ", ".join(entry) or "nothing"
            raise ConfigError(f"`{name}` is missing, there is {there}", "experts", EXAMPLE)
    below, found = _below(entry["below"]), Entry(entry)
    found["below"], where = below, f"experts: below {below:g}"
    if entry.get("guidance_scale") is not None:
        place = f"{where}: guidance_scale"
        found["guidance_scale"] = requests.guidance_scale(entry["guidance_scale"], place)
    found["model"] = _path(entry["model"], folder, f"{where}: model", hub=True)
    control = entry.get("control")
    if isinstance(control, list):
        found["control"] = [_path(one, folder, f"{where}: control") for one in control]
    elif control is not None:
        found["control"] = _path(control, folder, f"{where}: control")
    return found


def _below(value):
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not good or not 1 <= value < math.inf:
        what, fix = f"expected a training time, got {value!r}", "such as 200 of 1000"
        if good and 0 < value < 1:
            fix = f"1000 * (1 - denoising_end): {1000 * (1 - value):g} for the part {value:g}"
        raise ConfigError(what, "experts: below", fix)
    return float(min(value, 1e9))  # of any size in JSON


def _path(value, folder, where, hub=False):
    """A path as seen from here, or the hub id that it may be; what is no path, as it is."""
    if not isinstance(value, str | os.PathLike):
        return value
    path = os.fspath(value) if folder is None else os.path.join(folder, value)
    if os.fspath(value) and os.path.exists(path):
        return path
    if hub and HUB_ID.fullmatch(os.fspath(value)):
        return value
    fix = "paths are relative to the file's folder" if folder else "a path, or a hub id"
    raise ConfigError(f"there is nothing at {path[:200]!r}", where, fix)


def open_for(main, given):
    """A tuple of `Expert`, lowest noise first, of what `check_entries` gives or takes.

    They are opened as `main` was: its dtype, quantization, mesh, offload and `compat`.

    Raises:
        ConfigError: something else.
        CheckpointError: files that are missing or damaged.
    """
    modes = [getattr(c.module, "quantization", None) for c in main.components.values()]
    quantize = next(filter(None, modes), None)
    parts = {"mesh": main.mesh, "offload": main.offload}
    parts["dtype"] = main.components[main.denoiser].module.dtype
    found = []
    for entry in check_entries(given):
        if isinstance(entry, Expert):  # of a pipeline that lies where this one does
            found.append(entry)
            continue
        try:
            found.append(_open(entry, main.compat, quantize, parts))
        except CnxsError as error:
            where = f"experts: below {entry['below']:g}: {error.where}"
            raise type(error)(error.what, where, error.fix) from None
    return tuple(sorted(found, key=lambda expert: expert.below))


def _open(entry, compat, quantize, parts):
    """The `Expert` of one `Entry`."""
    pipe, denoiser, null = _model(entry["model"], entry.get("component"), quantize, parts)
    control = entry.get("control")
    compat = compat if pipe is None else pipe.compat
    controllers = controls.open_controllers(control, compat=compat, **parts)
    own = None if control is None else controllers
    plain = {name: value for name, value in entry.items() if _is_plain(value)}
    return Expert(entry["below"], pipe, denoiser, null, entry.get("guidance_scale"), own, plain)


def _is_plain(value):
    several = isinstance(value, list) and all(map(_is_plain, value))
    return several or isinstance(value, str | float | None)


def _model(given, component, quantize, parts):
    """(pipeline, None, None), or (None, denoiser, its null caption or None)."""
    from cnxs_jax.pipelines.base import Pipeline
    from cnxs_jax.pipelines.pipeline import load_pipeline, local_directory

    if component is not None and not isinstance(given, str | os.PathLike):
        raise ConfigError("`component` is of a path or a hub id", "component", "leave it out")
    if isinstance(given, Pipeline):
        return given, None, None
    if isinstance(given, tuple):
        module, params = controls.of_pair(given, where="model")[:2]
        return None, _placed(module, jax.tree.map(lambda x: x, params), parts), None
    if isinstance(given, TextToImage) or not isinstance(given, str | os.PathLike):
        kind = getattr(given, "class_name", type(given).__name__)
        fix = "a pipeline's or a denoiser's path, a loaded pipeline but a cascade, (module, params)"
        raise ConfigError(f"a {kind} is no expert", "model", fix)
    alone = os.path.isfile(given) or os.path.isdir(given) and not _is_pipeline(given)
    if component is None and not alone:
        pipe = load_pipeline(given, quantize=quantize, **parts)
        if not isinstance(pipe, Pipeline):
            raise ConfigError(f"a {pipe.class_name} is no expert", "model", "a pipeline of latents")
        return pipe, None, None
    path = pathlib.Path(given if os.path.exists(given) else local_directory(given))
    if path.is_dir():
        path, component = component_directory(path, component), None
    module, params = read_model(path, component, dtype=parts["dtype"])
    null = fitting_null(load_null_caption(path, component), module, path)
    return None, _placed(module, params, parts), null


def _is_pipeline(path):
    return os.path.isfile(os.path.join(path, INDEX))


def _placed(module, params, parts):
    """The `Component` on the device or the mesh or, offloaded, on the host."""
    hosted = parts["offload"] is not None
    return Component(module, jax.device_get(params) if hosted else place(params, parts["mesh"]))


def route(table, experts):
    """`table` with the expert column; the pipeline itself is the last one, of the highest noise.

    Warns of those that have no row of it.
    """
    routed = routing.route(table, [expert.below for expert in experts], by="t")
    for n, expert in enumerate(experts):
        if n not in routed.expert:
            text = f"the expert below {expert.below:g} has none of the {len(table)} steps"
            warnings.warn(text, stacklevel=5)
    return routed


def members(main, table, request, control, size, latent_size):
    """`(networks, conditions)` of all that draw, lowest noise first, the pipeline last.

    Args:
        table: the routed one; of experts without a row of it no condition is made.
        control: the call's `Control`, or None.
        size, latent_size: (H, W) that is drawn, and of its latents.

    Returns:
        Two tuples of one entry a denoiser: (module, params), and a dict of arrays [B, ...].
    """
    shown = main.condition(request, control, size, latent_size)
    networks, conds = [], []
    for n, expert in enumerate(main.experts):
        pipe = expert.pipeline(main)
        networks.append(controls.attach(pipe.components[pipe.denoiser], pipe.controllers))
        same = expert.guidance in (None, request.guidance) and _sees_the_same(pipe, main)
        if same or n not in table.expert:
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
    shared = {name: part for name, part in main.components.items() if name != main.denoiser}
    rest = all(pipe.components.get(name) is part for name, part in shared.items())
    texts = ("tokenizer", "null_text", "style")
    rest = rest and all(getattr(pipe, name) is getattr(main, name) for name in texts)
    kind = type(pipe) is type(main) and pipe.options == main.options
    return rest and kind and own == other and pipe.controllers is main.controllers

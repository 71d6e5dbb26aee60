"""The stages of eDiff-I's cascade, which `ediffi.py` joins: how one is sampled and stored."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from cnxs_jax.data import text as texts_to_tokens
from cnxs_jax.diffusion import edm, expert_tree, guidance, sampling, schedule, solvers
from cnxs_jax.diffusion.expert_tree import Interval, LogNormal
from cnxs_jax.errors import CheckpointError, ConfigError, did_you_mean
from cnxs_jax.models.conditioning import Encoders
from cnxs_jax.pipelines.base import Component
from cnxs_jax.pipelines.load import place, read_model, save_model
from cnxs_jax.pipelines.scheduler import read_json
from cnxs_jax.storage import write_json

SOLVERS = {"deis": 3, "ab": 3, "dpmpp": 2, "euler": 1}  # with the highest order each has
# encoder -> (directory of its network, directory of its tokenizer)
FILES = {
    "text": ("text_encoder", "tokenizer"),
    "clip_text": ("clip_text_encoder", "clip_tokenizer"),
    "clip_image": ("clip_image_encoder", None),
}


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a stage is sampled: the EDM grid (Karras et al. 2022, eq. 5), a solver and guidance.

    Attributes:
        solver, steps: of `diffusion.solvers`.
        order: the solver's, or the highest it has if that is less; None is its default.
        sigma_min, sigma_max, rho: of the grid.
        guidance_scale: w of eps_u + w (eps_c - eps_u); off if w <= 1.
        threshold: quantile of the dynamic threshold on x0; None clips x0 to [-1, 1].
        noise_level: noise put into the low-resolution picture; None for the base.
    """

    solver: str = "deis"
    steps: int = 25
    order: int | None = None
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    guidance_scale: float = 5.0
    threshold: float | None = 0.995
    noise_level: float | None = None

    def table(self, steps=None):
        """The solver's table, made on the host.

        Raises:
            ConfigError: an unknown solver or order, or a grid that does not fall.
        """
        if self.solver not in tuple(SOLVERS):
            raise ConfigError(
                f"unknown solver {self.solver!r}.{did_you_mean(self.solver, SOLVERS)}",
                "sampler.solver",
                f"use one of {', '.join(SOLVERS)}",
            )
        grid = schedule.edm(self.sigma_min, self.sigma_max, self.rho)
        if self.order not in (None, 1, 2, 3):
            raise ConfigError(f"unknown order {self.order!r}", "sampler.order", "use 1, 2 or 3")
        most = SOLVERS[self.solver]
        options = {} if self.order is None or most == 1 else {"order": min(self.order, most)}
        return getattr(solvers, self.solver)(grid, steps or self.steps, **options)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One resolution of the cascade.

    Attributes:
        name: its directory.
        size: side of the square picture, pixels.
        experts: `Component`s, lowest noise first.
        intervals: their quantiles of `levels`, the training noise distribution.
        hosted: whether they lie in host memory, and come to the device one at a time.
    """

    name: str
    size: int
    experts: tuple
    intervals: tuple = (expert_tree.WHOLE,)
    levels: LogNormal = LogNormal()
    sampler: Sampler = Sampler()
    sigma_data: float = edm.SIGMA_DATA
    hosted: bool = False

    def draw(self, noise, cond, steps=None):
        """Pictures [B,H,W,3] around [-1, 1] from standard normal `noise` of that shape."""
        table = expert_tree.route(self.sampler.table(steps), self.intervals, self.levels)
        modules, params = zip(*self.experts, strict=True)
        if not self.hosted:
            return draw_stage(
                modules, params, noise, cond, table, self.sigma_data, self.sampler.threshold
            )
        networks, post = denoisers(modules, self.sigma_data), bounded(self.sampler.threshold)
        return sampling.sample_from_host(networks, params, noise, cond, table, post=post)

    def settings(self):
        """What `stage.json` holds."""
        return {
            "size": self.size,
            "sigma_data": self.sigma_data,
            "levels": {k: getattr(self.levels, k) for k in ("mean", "std", "scale")},
            "experts": [{"low": i.low, "high": i.high, "name": i.name} for i in self.intervals],
            "sampler": dataclasses.asdict(self.sampler),
        }


@functools.partial(jax.jit, static_argnames=("modules", "sigma_data", "threshold"))
def draw_stage(modules, params, noise, cond, table, sigma_data, threshold):
    """One compiled program a stage: a scan a segment of rows with the same expert."""
    networks = denoisers(modules, sigma_data)
    if len(networks) == 1:
        networks, params = networks[0], params[0]
    return sampling.sample(networks, params, noise, cond, table, post=bounded(threshold))


def denoisers(modules, sigma_data):
    """The guided denoiser of each module."""
    return tuple(
        guidance.styled(edm.precondition(sampling.denoiser(module), sigma_data))
        for module in modules
    )


@functools.cache
def bounded(threshold):
    """What keeps x0 in its range: the same function for the same quantile, None clips."""
    return clipped if threshold is None else guidance.dynamic_threshold(threshold)


def clipped(x0):
    """Pictures lie in [-1, 1]."""
    return jnp.clip(x0, -1.0, 1.0)


def write_stage(stage, directory, dtype=None):
    """`stage.json` and one directory an expert."""
    for i, expert in enumerate(stage.experts):
        save_model(*expert, directory / f"expert_{i}", dtype)
    write_json(directory / "stage.json", stage.settings())


def write_encoders(encoders, params, tokenizers, directory, dtype=None):
    """Networks and tokenizers of the encoders that are there."""
    for name, (folder, tokens) in FILES.items():
        if getattr(encoders, name) is None:
            continue
        save_model(getattr(encoders, name), params[name], directory / folder, dtype)
        if tokens:
            tokenizers[name].save_pretrained(directory / tokens)


def read_stage(directory, name, dtype=None, put=place):
    """The `Stage` of a directory; `put(host arrays)` places an expert, None leaves it there."""
    given = read_json(directory / "stage.json")
    try:
        intervals = tuple(Interval(e["low"], e["high"], e["name"]) for e in given["experts"])
        levels, sampler = LogNormal(**given["levels"]), Sampler(**given["sampler"])
        size, sigma_data = given["size"], given["sigma_data"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"no settings of a stage: {error}", str(directory)) from None
    sampler.table()
    expert_tree.check_cover(intervals)
    experts = tuple(opened(directory / f"expert_{i}", dtype, put) for i in range(len(intervals)))
    return Stage(name, size, experts, intervals, levels, sampler, sigma_data, put is None)


def opened(directory, dtype, put):
    """The `Component` of a network's directory."""
    module, params = read_model(directory, dtype=dtype)
    return Component(module, params if put is None else put(params))


def read_encoders(directory, dtype=None, beside=None, put=place):
    """`(encoders, params, tokenizers)` of the encoders that a directory has.

    Args:
        put: as in `read_stage`.
        beside: {encoder: name of the neighbouring directory that has it}, of the index.

    Raises CheckpointError for one that is no neighbour, or has no such encoder.
    """
    if beside is not None and (not isinstance(beside, dict) or set(beside) - set(FILES)):
        what = f"encoders_beside is {beside!r}, expected names of directories for {list(FILES)}"
        raise CheckpointError(what, str(directory))
    modules, params, tokenizers = {}, {}, {}
    for name, (folder, tokens) in FILES.items():
        there = neighbour(directory, name, beside[name]) if name in (beside or {}) else directory
        if not (there / folder).is_dir():
            if there is not directory:
                raise CheckpointError(f"no {folder}, which {directory} names", str(there))
            continue
        modules[name], params[name] = opened(there / folder, dtype, put)
        if tokens:
            tokenizers[name] = texts_to_tokens.load_tokenizer(there / tokens)
    return Encoders(**modules), params, tokenizers


def neighbour(directory, encoder, name):
    """The directory `name` beside `directory`; an index of a stranger can name no other place."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
        what = f"{name!r} is no name of a neighbouring directory"
        raise CheckpointError(what, f"{directory}: encoders_beside.{encoder}")
    return directory.absolute().parent / name

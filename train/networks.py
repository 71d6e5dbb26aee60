"""The networks of a PixArt pipeline as a task uses them: with weights, without, or as mere shapes.

A task of PixArt is built by a function `(config, networks, empty) -> (Task, more)` that touches
neither files nor data; `Recipe` says where its pipeline is. So the same function serves training,
training on cached features, and the planner, which runs it on shapes.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnxs_jax.control import hints
from cnxs_jax.data.features import read_empty, weights_hash
from cnxs_jax.errors import ConfigError, did_you_mean
from cnxs_jax.models.dit import PixArt
from cnxs_jax.models.t5 import T5Encoder
from cnxs_jax.models.vae import AutoencoderKL
from train import inputs
from train.parts import check_fit, check_scheduler

# What the published pipelines' config.json files say beyond our modules' defaults.
PUBLISHED = {
    "PixArt-XL-2-256x256": {"sample_size": 32},
    "PixArt-XL-2-512x512": {"sample_size": 64},
    "PixArt-XL-2-1024-MS": {"sample_size": 128},
}


class Networks(NamedTuple):
    """Modules and parameters; `vae_params` and `text_params` are None on cached features."""

    dit: Any
    dit_params: Any
    vae: Any
    vae_params: Any
    text: Any
    text_params: Any
    null: Any = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a task is built of a pipeline.

    Attributes:
        path: the config's key of the pipeline's directory.
        build: `(config, networks, empty) -> (Task, more)`: the step, without data and results.
        arrays: the arrays of an example that it reads.
        hint: `raw -> uint8 picture [B,H,W,3]` of the control picture, or None.
        zeros: `(config, path) -> networks` of zeros, for the planner; PixArt's unless given.
        cacheable: whether `train.cache` can store what its encoders make.
    """

    path: str
    build: Callable
    arrays: tuple = ("image",)
    hint: Callable | None = None
    zeros: Callable | None = None
    cacheable: bool = True


def load(config, path, cached=False):
    """The networks of the pipeline at `path`; without its encoders' weights if `cached`."""
    from cnxs_jax.pipelines.load import abstract_model, read_model

    dtype = jnp.dtype(config.get("dtype") or "float32")
    # float32 parameters whatever the network computes in: bfloat16 would round the updates away
    dit, dit_params = read_model(f"{path}/transformer")
    dit = dit.clone(dtype=dtype, remat=config.get("remat"))
    if cached:
        vae, _ = abstract_model(f"{path}/vae")
        text, _ = abstract_model(f"{path}/text_encoder", dtype=dtype)
        return Networks(dit, dit_params, vae, None, text, None, null_caption(config, path))
    nets = load_encoders(config, path)
    return nets._replace(dit=dit, dit_params=dit_params, null=null_caption(config, path))


def load_encoders(config, path):
    """Those `Networks` that make features; the denoiser is None."""
    from cnxs_jax.pipelines.load import read_model

    dtype = jnp.dtype(config.get("dtype") or "float32")
    text = read_model(f"{path}/text_encoder", dtype=dtype)
    return Networks(None, None, *read_model(f"{path}/vae"), *text)


def null_caption(config, path):
    """PixArt's learned null caption [max_length, D] where the config asks for it, or None."""
    if config.get("null") != "learned":
        return None
    length = inputs.max_length(config)
    null = inputs.null_caption(path)[:length]
    if len(null) < length:
        what = f"max_length {length}, the learned null caption has {len(null)}"
        raise ConfigError(what, "config.data.max_length")
    return null


def modules(config, path):
    """`{component: (module, shapes)}` of a pipeline's directory, or of a published one by name."""
    from cnxs_jax.convert import families
    from cnxs_jax.pipelines.load import abstract_model

    dtype = jnp.dtype(config.get("dtype") or "float32")
    names = ("transformer", "vae", "text_encoder")
    if pathlib.Path(path).is_dir():
        found = {name: abstract_model(f"{path}/{name}") for name in names}
    else:
        name = pathlib.Path(path).name
        if name not in PUBLISHED:
            hint = did_you_mean(name, PUBLISHED)
            fix = f"give a diffusers directory, or one of {', '.join(PUBLISHED)}"
            raise ConfigError(
                f"no pipeline at {path!r}, and none is published so.{hint}", name, fix
            )
        made = PixArt(**PUBLISHED[name]), AutoencoderKL(), T5Encoder()
        found = {n: (m, families.shapes(m)) for n, m in zip(names, made, strict=True)}
    dit, text = found["transformer"], found["text_encoder"]
    found["transformer"] = dit[0].clone(dtype=dtype, remat=config.get("remat")), dit[1]
    halved = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), text[1])
    return found | {"text_encoder": (text[0].clone(dtype=dtype), halved)}


def zeros(config, path):
    """`Networks` whose parameters are zeros: inside of `jax.eval_shape`, shapes without memory."""
    found = modules(config, path)

    def filled(name):
        module, shapes = found[name]
        return module, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    null = None
    if config.get("null") == "learned":
        null = jnp.zeros((inputs.max_length(config), found["text_encoder"][0].d_model))
    return Networks(*filled("transformer"), *filled("vae"), *filled("text_encoder"), null)


def encoder_hashes(path):
    """What identifies the encoders of a pipeline's directory, and what gives them their tokens."""
    return {name: weights_hash(f"{path}/{name}") for name in ("vae", "text_encoder", "tokenizer")}


def cache_settings(config, path, hint):
    """What a cache of `config`'s features must have been made with."""
    data, hashes = config.data, encoder_hashes(path)
    drawn_by = None if hint is None else hints.named(data.hint).weights
    if drawn_by is not None:
        hashes[data.hint] = drawn_by.digest(data.get("hint_path"))
    return {
        "encoders": hashes,
        "dtype": config.get("dtype") or "float32",
        "size": data.size,
        "max_length": inputs.max_length(config),
        "buckets": bool(data.get("buckets")),
        "hint": None if hint is None else data.hint,
    }


def cached_source(loader, config, path, hint):
    """The source of features that a loader reads, checked against `config`, or None."""
    if config.data.source != "features":
        return None
    source = loader.source
    source.check(cache_settings(config, path, hint))
    return source


class Opened(NamedTuple):
    """What `opened` finds: the loader reads features where `tokenizer` is None."""

    networks: Networks
    loader: Any
    tokenizer: Any
    empty: dict

    @property
    def cached(self):
        """Whether the encoders' work is read from a cache."""
        return self.tokenizer is None


def opened(config, recipe):
    """Data and networks of a task, checked against each other.

    Raises:
        ConfigError: networks, noise schedule and sizes that do not fit.
        DataError: cached features of other encoders or settings.
    """
    path = config[recipe.path]
    loader, tokenizer = inputs.open_loader(
        config, tokenizer_path=f"{path}/tokenizer", keys=recipe.arrays, encoded=True
    )
    source = cached_source(loader, config, path, recipe.hint)
    nets = load(config, path, source is not None)
    check_scheduler(config, path)
    check_fit(nets.dit, nets.vae, nets.text, config.data.size)
    if source is None:
        return Opened(nets, loader, tokenizer, inputs.tokens(config, tokenizer, [""]))
    text, mask = read_empty(source)
    return Opened(nets, loader, None, {"text": text[None], "text_mask": mask[None]})


def recipe_of(config):
    """The `Recipe` of the task that a config names. Raises ConfigError where it has none."""
    module, _, function = config.task.partition(":")
    recipes = getattr(importlib.import_module(module), "RECIPES", {})
    if function not in recipes:
        what = f"the task {config.task!r} is not built on a pipeline's frozen encoders"
        raise ConfigError(what, "config.task", "e.g. configs/pixart_lcm.py has such a task")
    return recipes[function]

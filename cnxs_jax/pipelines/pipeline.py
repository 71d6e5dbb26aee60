"""Opening and writing pipelines in diffusers' directory layout (`model_index.json`)."""

import json
import os
import pathlib
import re
import shutil
import tempfile

import jax
import jax.numpy as jnp

from cnxs_jax.diffusion import solvers
from cnxs_jax.errors import CheckpointError, ConfigError, did_you_mean
from cnxs_jax.pipelines import scheduler as schedulers
from cnxs_jax.pipelines.base import Component, Pipeline, refuse_parts
from cnxs_jax.pipelines.ediffi import EDiffIPipeline
from cnxs_jax.pipelines.load import load_model, load_null_caption, save_model
from cnxs_jax.pipelines.pixart import PixArtAlphaPipeline

__all__ = ["FAMILIES", "load_pipeline", "save_pipeline"]

FAMILIES = {family.class_name: family for family in (PixArtAlphaPipeline, EDiffIPipeline)}
INDEX = "model_index.json"
# The diffusers release whose layout is written; it reads the number for information only.
DIFFUSERS_VERSION = "0.42.1"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Enough for a pipeline; leaves out the .bin and .ckpt copies that many hub repositories carry.
HUB_FILES = ("*.json", "*/*.json", "*/*.safetensors", "*.safetensors", "*/*.model", "*/*.txt")


def load_pipeline(
    path, control=None, lora=None, experts=None, scheduler=None, dtype=None, mesh=None
) -> Pipeline:
    """A pipeline from a diffusers directory or, where huggingface_hub is installed, a hub id.

    Args:
        path: directory with `model_index.json`, or "owner/name".
        control, lora, experts: parts for families that take them.
        scheduler: "ddim", "ddpm", "euler", "dpmpp", "deis", "lcm" or a diffusers scheduler config
            dict, instead of the stored one; the model's noise schedule stays.
        dtype: "float32" (default) or "bfloat16", of the denoiser's and the text encoder's
            parameters and arithmetic. The autoencoder stays in float32.
        mesh: a mesh of `cnxs_jax.sharding.make_mesh` over which parameters and batch are split.

    Raises:
        ConfigError: an unknown class or scheduler, or a part that the family does not take.
        CheckpointError: missing or damaged files.
    """
    compute = _compute_dtype(dtype)
    directory = _directory(path)
    family = _family(directory)
    if hasattr(family, "read"):  # a layout of its own
        parts = {"control": control, "lora": lora, "experts": experts}
        return family.read(directory, compute, scheduler=scheduler, mesh=mesh, **parts)
    refuse_parts(family.class_name, control=control, lora=lora, experts=experts)
    config = schedulers.read(directory)
    if "_class_name" not in config:
        raise CheckpointError("`_class_name` is missing", str(directory / "scheduler"))
    if scheduler is not None:
        config = schedulers.override(config, scheduler)
    solvers.from_config(config, 1)  # an unusable scheduler is found before weights are read
    tokenizer = family.load_tokenizer(directory / "tokenizer")
    components = {}
    for name in family.networks:
        # The autoencoder runs once an image and is the first to lose visible precision.
        own = jnp.float32 if name == "vae" else compute
        module, params = load_model(directory / name, dtype=own)
        rules = family.sharding_rules.get(name, ())
        components[name] = Component(module, _place(params, mesh, rules))
    null = _null_text(directory, family, components)
    return family(components, tokenizer, config, null, mesh)


def save_pipeline(pipe, path, dtype=None):
    """Writes `pipe` in diffusers' layout, whole or not at all.

    `diffusers.DiffusionPipeline.from_pretrained(path)` opens it. A learned null caption goes into
    a side file of the denoiser, which diffusers ignores.

    Args:
        path: a new or empty directory, or an earlier pipeline, which is replaced.
        dtype: of the stored weights, "float32" or "bfloat16"; as they are unless given.

    Raises:
        ConfigError: `path` holds something else.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file", "save_pipeline")
    if path.exists() and any(path.iterdir()) and not (path / INDEX).exists():
        raise ConfigError(
            f"{path} is not empty and not a pipeline", "save_pipeline", "choose another directory"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        _write(pipe, part / "new", dtype)
        if path.exists():
            path.rename(part / "old")
        (part / "new").rename(path)
    finally:
        if (part / "old").exists() and not path.exists():
            (part / "old").rename(path)
        shutil.rmtree(part, ignore_errors=True)


def _write(pipe, directory, dtype):
    directory.mkdir()
    if hasattr(pipe, "write"):  # a layout of its own
        return pipe.write(directory, dtype)
    index = {"_class_name": pipe.class_name, "_diffusers_version": DIFFUSERS_VERSION}
    for name, (library, class_name) in pipe.classes.items():
        if name == "scheduler":
            class_name = pipe.scheduler["_class_name"]
            _write_json(directory / name / "scheduler_config.json", pipe.scheduler)
        elif name == "tokenizer":
            _write_tokenizer(pipe.tokenizer, directory / name)
        else:
            null = pipe.null_text if name == pipe.denoiser else None
            save_model(*pipe.components[name], directory / name, dtype, null_caption=null)
        index[name] = [library, class_name]
    _write_json(directory / INDEX, index)


def _write_tokenizer(tokenizer, directory):
    tokenizer.save_pretrained(directory)
    # What transformers 4 reads; transformers 5 does not write it again.
    pieces = pathlib.Path(tokenizer.name_or_path) / "spiece.model"
    if pieces.is_file() and not (directory / pieces.name).exists():
        shutil.copyfile(pieces, directory / pieces.name)


def _write_json(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _compute_dtype(dtype):
    if dtype is None:
        return jnp.float32
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    if name not in DTYPES:
        raise ConfigError(
            f"unsupported dtype {name!r}.{did_you_mean(name, DTYPES)}",
            "dtype",
            "float32 or bfloat16 (float16 overflows in the text encoder and the autoencoder)",
        )
    return DTYPES[name]


def _directory(path):
    """The local directory of a path or hub id."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"expected a directory or hub id, got {type(path).__name__}", "path")
    local = pathlib.Path(path)
    if local.is_dir():
        if not (local / INDEX).is_file():
            raise CheckpointError(
                f"the directory has no {INDEX}",
                str(local),
                "give a diffusers pipeline directory; `load_model` opens single components",
            )
        return local
    text = str(path)
    if local.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        raise CheckpointError(f"there is no directory {text!r}", "path")
    return _from_hub(text)


def _from_hub(name):
    recipe = (
        f"on a machine with network run `hf download {name} --local-dir DIR`, copy DIR here and "
        "load it by its path"
    )
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"no directory of this name, and huggingface_hub is not installed: {INDEX} is missing",
            name,
            recipe,
        ) from None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(HUB_FILES), local_files_only=offline
            )
        )
    except Exception as error:  # the hub client raises many kinds, some of its dependencies'
        reason = "HF_HUB_OFFLINE is set and the cache lacks it" if offline else str(error)
        raise CheckpointError(
            f"no directory of this name, and {INDEX} could not be had from the hub: "
            f"{reason.strip().splitlines()[0] if reason.strip() else type(error).__name__}",
            name,
            recipe,
        ) from None


def _family(directory):
    name = schedulers.read_json(directory / INDEX).get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"the pipeline class {name!r} is not supported.{did_you_mean(name, FAMILIES)}",
            str(directory / INDEX),
            f"supported: {', '.join(FAMILIES)}",
        )
    return FAMILIES[name]


def _place(params, mesh, rules):
    """Parameters on the device, or split over the mesh."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, params)
    from cnxs_jax import sharding

    return jax.device_put(params, sharding.shardings(params, mesh, rules))


def _null_text(directory, family, components):
    """The learned unconditional caption [L,D] beside the denoiser or in the pipeline, or None."""
    null = load_null_caption(directory / family.denoiser)
    if null is None:
        return None
    width = components[family.denoiser].module.caption_channels
    if null.shape[1] != width:
        raise CheckpointError(
            f"null_caption is {list(null.shape)}, the model reads [L,{width}]", str(directory)
        )
    return jnp.asarray(null)

"""Opening and writing pipelines in diffusers' directory layout (`model_index.json`)."""

import os
import pathlib
import re
import shutil
import tempfile

import jax.numpy as jnp

from cnxs_jax.convert import controlnet_xs_fused
from cnxs_jax.convert.families import family_of_module
from cnxs_jax.diffusion import solvers
from cnxs_jax.errors import CheckpointError, ConfigError, did_you_mean, first_line
from cnxs_jax.models import tiling
from cnxs_jax.pipelines import offload as offloading
from cnxs_jax.pipelines import scheduler as schedulers
from cnxs_jax.pipelines.base import Component, Pipeline
from cnxs_jax.pipelines.control import open_controllers
from cnxs_jax.pipelines.ediffi import EDiffIPipeline
from cnxs_jax.pipelines.load import load_null_caption, place, read_model, save_model
from cnxs_jax.pipelines.pixart import PixArtAlphaPipeline
from cnxs_jax.pipelines.request import refuse_parts
from cnxs_jax.pipelines.save_xs import FUSED, FUSED_COMPAT, is_fused, save_fused
from cnxs_jax.pipelines.stable_diffusion import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from cnxs_jax.storage import write_json

__all__ = ["FAMILIES", "load_pipeline", "save_pipeline"]

DIFFUSERS = (PixArtAlphaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline)
FAMILIES = {family.class_name: family for family in (*DIFFUSERS, EDiffIPipeline)}
# {class of a pipeline with a controller: (family, whose computation it follows)}
CONTROLLED = {name: (f, compat) for f in DIFFUSERS for name, compat in f.controlled.values()}
CONTROL = "controlnet"  # the controller's directory
COMPAT = "_control_compat"  # diffusers reads no names that begin with an underscore
INDEX = "model_index.json"
# The diffusers release whose layout is written; it reads the number for information only.
DIFFUSERS_VERSION = "0.42.1"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Enough for a pipeline; leaves out the .bin and .ckpt copies that many hub repositories carry.
HUB_FILES = ("*.json", "*/*.json", "*/*.safetensors", "*.safetensors", "*/*.model", "*/*.txt")


def load_pipeline(
    path,
    control=None,
    lora=None,
    experts=None,
    scheduler=None,
    dtype=None,
    mesh=None,
    offload=None,
    quantize=None,
    vae_tiling=False,
) -> Pipeline:
    """A pipeline from a diffusers directory or, where huggingface_hub is installed, a hub id.

    Args:
        path: directory with `model_index.json`, or "owner/name".
        control: a controller instead of the stored one: the directory or file of an adapter, a pair
            (module, params), a `pipelines.control.Controller`, or a list of these.
        lora, experts: parts for families that take them.
        scheduler: "ddim", "ddpm", "euler", "dpmpp", "deis", "lcm" or a diffusers scheduler config
            dict, instead of the stored one; the model's noise schedule stays.
        dtype: "float32" (default) or "bfloat16", of the denoiser's and the text encoder's
            parameters and arithmetic. The autoencoder stays in float32.
        mesh: a mesh of `cnxs_jax.sharding.make_mesh` over which parameters and batch are split.
        offload: "model": each network is on the device only while it runs; "sequential": the T5
            encoder block by block, too (`cnxs_jax.pipelines.offload`).
        quantize: "int8": the text encoder's kernels (`cnxs_jax.convert.quantize`).
        vae_tiling: decode large pictures in overlapping tiles (`cnxs_jax.models.tiling`).

    Raises:
        ConfigError: an unknown class or scheduler, or a part that the family does not take.
        CheckpointError: missing or damaged files.
    """
    compute = _compute_dtype(dtype)
    offloading.check(offload, mesh, quantize)
    directory = _directory(path)
    index = schedulers.read_json(directory / INDEX)
    family, compat = _family(index, directory)
    if hasattr(family, "read"):  # a layout of its own
        parts = {"control": control, "lora": lora, "experts": experts, "scheduler": scheduler}
        parts |= {"mesh": mesh, "offload": offload, "quantize": quantize}
        parts["vae_tiling"] = vae_tiling or None
        return family.read(directory, compute, **parts)
    refuse_parts(family.class_name, lora=lora, experts=experts)
    config = schedulers.read(directory)
    if "_class_name" not in config:
        raise CheckpointError("`_class_name` is missing", str(directory / "scheduler"))
    if scheduler is not None:
        config = schedulers.override(config, scheduler)
    solvers.from_config(config, 1)  # an unusable scheduler is found before weights are read
    if control is None and compat is not None:
        # Training changes the fused one, not the copy that diffusers stores beside it.
        denoiser = directory / family.denoiser
        control = denoiser if is_fused(denoiser) else directory / CONTROL
    controllers = open_controllers(control, compute, compat or "official", mesh)
    tokenizers = tuple(family.load_tokenizer(directory / name) for name in family.tokenizers)
    components = {}
    for name in family.networks:
        # The autoencoder runs once an image and is the first to lose visible precision.
        own = jnp.float32 if name == "vae" else compute
        mode = quantize if name.startswith("text_encoder") else None
        part = name if name in controlnet_xs_fused.TABLES else None
        if offload is not None:
            read = offloading.load(directory / name, offload, own, mode, part)
            components[name] = Component(*read)
            continue
        module, params = read_model(directory / name, part, dtype=own, quantize=mode)
        components[name] = Component(module, place(params, mesh))
    null = _null_text(directory, family, components)
    options = {name: index[name] for name in family.default_options if name in index}
    tokenizer = tokenizers if len(tokenizers) > 1 else tokenizers[0]
    tile = tiling.TILE if vae_tiling else None
    pipe = family(components, tokenizer, config, null, mesh, controllers, options, offload, tile)
    pipe.check()
    return pipe


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
    offloading.refuse_saving(pipe.components)
    index = {"_class_name": pipe.class_name, "_diffusers_version": DIFFUSERS_VERSION}
    index |= {name: pipe.option(name) for name in pipe.default_options}
    fused = False
    if pipe.controllers:
        index |= _write_controller(pipe, directory, dtype)
        fused = pipe.controllers[0].compat == FUSED_COMPAT
    tokenizers = pipe.tokenizer if isinstance(pipe.tokenizer, tuple) else (pipe.tokenizer,)
    tokenizers = dict(zip(pipe.tokenizers, tokenizers, strict=True))
    for name, (library, class_name) in pipe.classes.items():
        if name == "scheduler":
            class_name = pipe.scheduler["_class_name"]
            write_json(directory / name / "scheduler_config.json", pipe.scheduler)
        elif name in tokenizers:
            _write_tokenizer(tokenizers[name], directory / name)
        elif fused and name == pipe.denoiser:
            # diffusers computes `FUSED_COMPAT` where it finds the two fused, and only there
            save_fused(pipe.components[name], pipe.controllers[0][:2], directory / name, dtype)
            class_name = FUSED
        else:
            null = pipe.null_text if name == pipe.denoiser else None
            save_model(*pipe.components[name], directory / name, dtype, null_caption=null)
        index[name] = [library, class_name]
    write_json(directory / INDEX, index)


def _write_controller(pipe, directory, dtype):
    """Entries of the index for a pipeline with its controller, which is written beside."""
    if len(pipe.controllers) > 1:
        raise ConfigError(
            "a pipeline of several controllers has no layout",
            "save_pipeline",
            "save each with `save_model`, and the pipeline with `pipe.replace(control=[])`",
        )
    module, params, compat = pipe.controllers[0]
    name = family_of_module(module).classes[0]
    if name not in pipe.controlled:
        raise ConfigError(f"{pipe.class_name} has no layout with a {name}", "save_pipeline")
    save_model(module, params, directory / CONTROL, dtype)
    class_name, _ = pipe.controlled[name]
    return {"_class_name": class_name, CONTROL: ["diffusers", name], COMPAT: compat}


def _write_tokenizer(tokenizer, directory):
    tokenizer.save_pretrained(directory)
    # What transformers 4 reads; transformers 5 does not write it again.
    for name in ("spiece.model", "vocab.json", "merges.txt"):
        source = pathlib.Path(tokenizer.name_or_path) / name
        if source.is_file() and not (directory / name).exists():
            shutil.copyfile(source, directory / name)


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
        reason = "HF_HUB_OFFLINE is set and the cache lacks it" if offline else first_line(error)
        raise CheckpointError(
            f"no directory of this name, and {INDEX} could not be had from the hub: {reason}",
            name,
            recipe,
        ) from None


def _family(index, directory):
    """`(family, compat)`: the compat of its stored controller, None where it has none."""
    name = index.get("_class_name")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name], None
    if isinstance(name, str) and name in CONTROLLED:
        family, compat = CONTROLLED[name]
        return family, index.get(COMPAT, compat)
    known = [*FAMILIES, *CONTROLLED]
    raise ConfigError(
        f"the pipeline class {name!r} is not supported.{did_you_mean(name, known)}",
        str(directory / INDEX),
        f"supported: {', '.join(known)}",
    )


def _null_text(directory, family, components):
    """The learned unconditional caption [L,D] beside the denoiser or in the pipeline, or None."""
    module = components[family.denoiser].module
    null = load_null_caption(directory / family.denoiser)
    if null is None or not hasattr(module, "caption_channels"):
        return None
    width = module.caption_channels
    if null.shape[1] != width:
        raise CheckpointError(
            f"null_caption is {list(null.shape)}, the model reads [L,{width}]", str(directory)
        )
    return jnp.asarray(null)

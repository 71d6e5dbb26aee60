"""Opening and writing pipelines in diffusers' directory layout (`model_index.json`)."""

import os
import pathlib
import re
import shutil
import tempfile

import jax.numpy as jnp

from cnxs_jax.errors import CheckpointError, ConfigError, did_you_mean, first_line
from cnxs_jax.pipelines import offload as offloading
from cnxs_jax.pipelines import scheduler as schedulers
from cnxs_jax.pipelines.base import Pipeline
from cnxs_jax.pipelines.diffusers_layout import COMPAT, INDEX
from cnxs_jax.pipelines.ediffi import EDiffIPipeline
from cnxs_jax.pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline
from cnxs_jax.pipelines.stable_diffusion import (
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

__all__ = ["FAMILIES", "load_pipeline", "save_pipeline"]

DIFFUSERS = (
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
FAMILIES = {family.class_name: family for family in (*DIFFUSERS, EDiffIPipeline)}
# Classes that add nothing to a family: published LCMs of Stable Diffusion are stored as the first.
ALIASES = {"LatentConsistencyModelPipeline": StableDiffusionPipeline}
# {class of a pipeline with a controller: (family, whose computation it follows)}
CONTROLLED = {name: (f, compat) for f in DIFFUSERS for name, compat in f.controlled.values()}
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
    style=None,
) -> Pipeline:
    """A pipeline from a diffusers directory or, where huggingface_hub is installed, a hub id.

    Args:
        path: directory with `model_index.json`, or "owner/name".
        control: a controller instead of the stored one: the directory or file of an adapter, a pair
            (module, params), a `pipelines.control.Controller`, or a list of these.
        lora: adapters that are merged into the denoiser: a LoRA file or PEFT directory, an adapter
            tree (`cnxs_jax.lora`), a pair of one of these and a factor, or a list of them.
        experts: denoisers that take over below some noise, such as SDXL's refiner: a list of
            dicts, or a JSON file of one (`cnxs_jax.pipelines.experts`).
        scheduler: "ddim", "ddpm", "euler", "dpmpp", "deis", "lcm" or a diffusers scheduler config
            dict, instead of the stored one; the model's noise schedule stays.
        dtype: "float32" (default) or "bfloat16", of the denoiser's and the text encoder's
            parameters and arithmetic. The autoencoder stays in float32.
        mesh: a mesh of `cnxs_jax.sharding.make_mesh` over which parameters and batch are split.
        offload: "model": each network is on the device only while it runs; "sequential": the T5
            encoder block by block, too, but a cascade's (`cnxs_jax.pipelines.offload`).
        quantize: "int8": the text encoder's kernels (`cnxs_jax.convert.quantize`).
        vae_tiling: decode large pictures in overlapping tiles (`cnxs_jax.models.tiling`).
        style: PixArt's reader of reference pictures, the directory that
            `configs/pixart_style.py` trains (`cnxs_jax.pipelines.style`); a cascade has its own.

    Raises:
        ConfigError: an unknown class or scheduler, or a part that the family does not take.
        CheckpointError: missing or damaged files.
    """
    compute = _compute_dtype(dtype)
    offloading.check(offload, mesh, quantize)
    directory = local_directory(path)
    index = schedulers.read_json(directory / INDEX)
    family, compat = _family(index, directory)
    parts = {"lora": lora, "experts": experts, "vae_tiling": vae_tiling or None, "style": style}
    parts |= {"control": control, "scheduler": scheduler, "mesh": mesh}
    parts |= {"offload": offload, "quantize": quantize}
    return family.read(directory, compute, compat, **parts)


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
        (part / "new").mkdir()
        pipe.write(part / "new", dtype)
        if path.exists():
            path.rename(part / "old")
        (part / "new").rename(path)
    finally:
        if (part / "old").exists() and not path.exists():
            (part / "old").rename(path)
        shutil.rmtree(part, ignore_errors=True)


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


def local_directory(path):
    """The local directory of a pipeline's path or hub id.

    Raises:
        ConfigError, CheckpointError: no path, no pipeline there, or not to be had from the hub.
    """
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
    if local.exists():
        raise CheckpointError(
            f"expected a pipeline's directory, got the file {text!r}",
            "model",
            f"give the directory that holds {INDEX}; `load_model` opens single components",
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        raise CheckpointError(
            f"there is no directory {text!r}", "model", "train or convert one, or give a hub id"
        )
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
    if isinstance(name, str) and name in FAMILIES | ALIASES:
        return (FAMILIES | ALIASES)[name], None
    if isinstance(name, str) and name in CONTROLLED:
        family, compat = CONTROLLED[name]
        return family, index.get(COMPAT, compat)
    known = [*FAMILIES, *ALIASES, *CONTROLLED]
    raise ConfigError(
        f"the pipeline class {name!r} is not supported.{did_you_mean(name, known)}",
        str(directory / INDEX),
        f"supported: {', '.join(known)}",
    )

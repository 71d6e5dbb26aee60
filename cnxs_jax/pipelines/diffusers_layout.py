"""diffusers' directory layout: what a `Pipeline` reads and writes."""

import pathlib
import re
import shutil

import jax.numpy as jnp

from cnxs_jax.convert import controlnet_xs_fused
from cnxs_jax.convert.families import family_of_module
from cnxs_jax.diffusion import solvers
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.models import tiling
from cnxs_jax.pipelines import offload as offloading
from cnxs_jax.pipelines import scheduler as schedulers
from cnxs_jax.pipelines.control import compat_of, open_controllers
from cnxs_jax.pipelines.interface import Component
from cnxs_jax.pipelines.load import load_null_caption, place, read_model, save_model
from cnxs_jax.pipelines.request import refuse_parts
from cnxs_jax.pipelines.save_xs import FUSED, FUSED_COMPAT, is_fused, save_fused
from cnxs_jax.storage import write_json

INDEX = "model_index.json"
CONTROL = "controlnet"  # the controller's directory; of several the others' are `controlnet_1`, ...
# {class of one controller: diffusers' class of several}; the others it has no pipeline of several.
SEVERAL = {"ControlNetModel": "MultiControlNetModel"}
COMPAT = "_control_compat"  # diffusers reads no names that begin with an underscore
# The diffusers release whose layout is written; it reads the number for information only.
DIFFUSERS_VERSION = "0.42.1"


def read(
    family,
    directory,
    dtype,
    compat=None,
    control=None,
    scheduler=None,
    mesh=None,
    offload=None,
    quantize=None,
    vae_tiling=None,
    **others,
):
    """The fields of a `Pipeline` of this family; arguments as `TextToImage.read` has them."""
    refuse_parts(family.class_name, **others)
    index = schedulers.read_json(directory / INDEX)
    config = schedulers.read(directory)
    if "_class_name" not in config:
        raise CheckpointError("`_class_name` is missing", str(directory / "scheduler"))
    if scheduler is not None:
        config = schedulers.override(config, scheduler)
    solvers.from_config(config, 1)  # an unusable scheduler is found before weights are read
    if control is None and compat is not None:
        # Training changes the fused one, not the copy that diffusers stores beside it.
        denoiser = directory / family.denoiser
        control = denoiser if is_fused(denoiser) else stored_controllers(directory, index)
    compat = compat or "official"
    controllers = open_controllers(control, dtype, compat, mesh, offload)
    compat = compat_of(controllers, compat)
    tokenizers = tuple(family.load_tokenizer(directory / name) for name in family.tokenizers)
    components = {}
    for name in family.networks:
        # The autoencoder runs once an image and is the first to lose visible precision.
        own = jnp.float32 if name == "vae" else dtype
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
    return components, tokenizer, config, null, mesh, controllers, options, offload, tile, compat


def stored_controllers(directory, index):
    """The directories of the controllers that lie beside the components, in order.

    The index says whether there are several, as it does for diffusers, which reads on until a
    number is missing. Raises CheckpointError where a later one is there all the same.
    """
    kind = index.get(CONTROL)
    if not isinstance(kind, list) or kind[-1:] not in [[name] for name in SEVERAL.values()]:
        return [directory / CONTROL]
    numbers = [re.fullmatch(rf"{CONTROL}_(\d+)", p.name) for p in directory.iterdir()]
    found = sorted(int(m[1]) for m in numbers if m and (directory / m[0]).is_dir())
    if found != list(range(1, len(found) + 1)):
        missing = next(n for n in range(1, len(found) + 2) if n not in found)
        raise CheckpointError(
            f"there is a controller {CONTROL}_{found[-1]}, but no {CONTROL}_{missing}",
            str(directory),
            "they are numbered without a gap: copy the missing one, or rename the others",
        )
    return [directory / CONTROL, *(directory / f"{CONTROL}_{n}" for n in found)]


def write(pipe, directory, dtype=None):
    """Writes `pipe` into `directory`."""
    offloading.refuse_saving(pipe.components)
    index = {"_class_name": pipe.class_name, "_diffusers_version": DIFFUSERS_VERSION}
    index |= {name: pipe.option(name) for name in pipe.default_options}
    fused = False
    if pipe.controllers:
        index |= _write_controllers(pipe, directory, dtype)
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


def _write_controllers(pipe, directory, dtype):
    """Entries of the index for a pipeline with its controllers, which are written beside."""
    name, compat = (
        family_of_module(pipe.controllers[0].module).classes[0],
        pipe.controllers[0].compat,
    )
    if name not in pipe.controlled:
        raise ConfigError(f"{pipe.class_name} has no layout with a {name}", "save_pipeline")
    kind = name if len(pipe.controllers) == 1 else SEVERAL.get(name)
    if kind is None:
        raise ConfigError(
            f"diffusers has no layout of a pipeline of several {name}",
            "save_pipeline",
            "save each with `save_model`, and the pipeline with `pipe.replace(control=[])`",
        )
    for n, controller in enumerate(pipe.controllers):
        save_model(*controller[:2], directory / (f"{CONTROL}_{n}" if n else CONTROL), dtype)
    class_name, _ = pipe.controlled[name]
    return {"_class_name": class_name, CONTROL: ["diffusers", kind], COMPAT: compat}


def _write_tokenizer(tokenizer, directory):
    tokenizer.save_pretrained(directory)
    # What transformers 4 reads; transformers 5 does not write it again.
    for name in ("spiece.model", "vocab.json", "merges.txt"):
        source = pathlib.Path(tokenizer.name_or_path) / name
        if source.is_file() and not (directory / name).exists():
            shutil.copyfile(source, directory / name)


def _null_text(directory, family, components):
    """The learned unconditional caption [L,D] beside the denoiser or in the pipeline, or None."""
    null = load_null_caption(directory / family.denoiser)
    return fitting_null(null, components[family.denoiser].module, directory)


def fitting_null(null, module, where):
    """The caption [L,D] on the device, None for a network that reads none; CheckpointError."""
    if null is None or not hasattr(module, "caption_channels"):
        return None
    width = module.caption_channels
    if null.shape[1] != width:
        raise CheckpointError(
            f"null_caption is {list(null.shape)}, the model reads [L,{width}]", str(where)
        )
    return jnp.asarray(null)

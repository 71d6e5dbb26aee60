"""Opens and writes one network: `load_model`, `save_model`."""

import os
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cnxs_jax import sharding, tree
from cnxs_jax.convert import (
    controlnet_xs,
    controlnet_xs_scales,
    families,
    files,
    pixart,
    pixart_control,
    rules,
    single_file,
)
from cnxs_jax.convert import controlnet_xs_fused as fused
from cnxs_jax.convert import quantize as int8
from cnxs_jax.errors import CheckpointError, ConfigError, did_you_mean
from cnxs_jax.storage import replacing, write_json

NULL_FILE = "null_caption.safetensors"
DTYPES = ("float32", "bfloat16", "float16")


def load_model(path, component=None, config=None, dtype=None, quantize=None):
    """Opens one network with its weights: `(module, params)`.

    Args:
        path: a component directory (config.json and weights) or a directory with that one alone, a
            pipeline directory together with `component`, or one weight file: the official PixArt
            `.pth` files and the single files of Stable Diffusion of the published sizes need
            nothing else, others need `config` or a config.json beside them.
        component: the pipeline's component ("transformer"), the network of a PixArt-ControlNet
            file ("transformer" or "controlnet"), of diffusers' fused ControlNet-XS ("unet" or
            "controlnet") or of a single file ("unet", "vae", "text_encoder", "text_encoder_2"), or
            the state dict of a `.pth` that has several ("state_dict_ema").
        config: a dict or a JSON file with diffusers' names; goes over the file's own.
        dtype: of parameters and computation ("bfloat16"); None: float32.
        quantize: "int8" for int8 kernels (T5 encoders), see `cnxs_jax.convert.quantize`.

    Returns:
        A Linen module and its parameters, jax arrays in a nested dict.

    Raises:
        ConfigError: unknown class or component, unsupported config.
        CheckpointError: missing, damaged, hostile or ill-fitting files.
    """
    module, params = read_model(path, component, config, dtype, quantize)
    return module, place(params)


def read_model(path, component=None, config=None, dtype=None, quantize=None):
    """`load_model` with numpy arrays in host memory: for whoever places them on a mesh."""
    dtype = check_dtype(dtype)
    module, target, tensors, table, where = open_model(path, component, config, dtype)
    if quantize is None:
        return module, rules.to_params(tensors, target, table, where, dtype or np.float32)
    module = int8.quantized(module, quantize)
    shapes = families.shapes(module)
    return module, int8.to_params(tensors, target, shapes, table, where, dtype or np.float32)


def place(params, mesh=None):
    """Host arrays on the device, or each straight on its shards of `mesh`, one after another.

    Every leaf is dropped from `params` as soon as it is placed: neither the host nor a device
    holds a whole network beside the placed one.
    """
    where = None if mesh is None else tree.flatten(sharding.shardings(params, mesh))
    flat = tree.flatten(params)
    params.clear()

    def put(name):
        leaf = flat.pop(name)
        return jnp.asarray(leaf) if where is None else sharding.put(leaf, where[name])

    return tree.unflatten({name: put(name) for name in list(flat)})


def abstract_model(path, component=None, dtype=None):
    """`(module, shapes)` of a component directory by its config.json: weights are not looked at.

    Raises ConfigError and CheckpointError as `load_model` does.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError("there is no such directory", str(path))
    where = component_directory(path, component) / "config.json"
    given = files.read_config(where)
    family = families.family_of(given, str(where))
    return families.build(family, given, str(where), check_dtype(dtype))


def open_model(path, component=None, config=None, dtype=None):
    """`(module, target shapes, tensors, table, file)`: everything but the conversion."""
    path = Path(path)
    given = files.read_config(config) if config is not None else {}
    if path.is_dir():
        directory = component_directory(path, component)
        where = directory / "config.json"
        given = {**files.read_config(where), **given}
        weights, which = files.find_weights(directory), None
    elif path.is_file():
        weights, which = path, component
        where = config if isinstance(config, str | os.PathLike) else path
        if not given and (path.parent / "config.json").is_file():
            where = path.parent / "config.json"
            given = files.read_config(where)
    else:
        raise CheckpointError("there is no such file or directory", str(path))
    tensors, part = read_component(weights, which)
    if fused.is_fused(tensors):
        tensors, given = part_of_fused(tensors, given, component, str(weights))
    if part is None:
        family, table, given = recognise(tensors, given, str(weights), str(where))
    else:
        family = families.family_of({"_class_name": part.class_name}, str(weights))
        table, given = part.table, given or part.config(str(weights))
    module, target = families.build(family, given, str(where), dtype)
    if callable(table):
        table = table(module)
        if controlnet_xs.is_official(tensors):
            tensors = controlnet_xs_scales.folded(tensors, module, str(weights))
        if part is None:
            report_unused(tensors, table, weights)
    return module, target, tensors, table, str(weights)


def part_of_fused(tensors, config, component, where):
    """(tensors, config) of the base or the controller of diffusers' fused ControlNet-XS."""
    if component not in fused.TABLES:
        raise ConfigError(
            f"the file holds base and controller: {', '.join(fused.TABLES)}",
            where,
            "give one of them as `component`",
        )
    return fused.split(tensors, where)[component], fused.split_config(config)[component]


def report_unused(tensors, table, weights):
    """Warns of tensors that the file has and no layer reads."""
    names = controlnet_xs.unused(tensors, table)
    if names:
        shown = ", ".join(names[:8])
        warnings.warn(f"{weights}: {len(names)} tensors are not used: {shown}", stacklevel=4)


def read_component(file, which=None):
    """`(tensors, part)` of one network; `which` is one of a file's networks or state dicts.

    `part` is a `single_file.Part` where the file is one, else None. A fused ControlNet-XS comes
    whole: `part_of_fused` takes it apart.
    """
    networks = (*pixart_control.PREFIXES, *single_file.COMPONENTS, *fused.TABLES)
    tensors = files.read_tensors(file, None if which in networks else which)
    if fused.is_fused(tensors):
        return tensors, None
    name = which if which in networks else None
    part = single_file.part_of(tensors, name, str(file))
    if part is not None:
        return part.tensors, part
    return pixart_control.component_of(tensors, name, str(file)), None


def recognise(tensors, config, weights, where):
    """`(family, table, config)` by the config's class, or by the names of the tensors."""
    if pixart.is_official(tensors):
        family = families.FAMILIES[0]
        return family, pixart.OFFICIAL, config or pixart.config_of(tensors, weights)
    if pixart_control.is_official(tensors):
        family = families.family_of({"_class_name": "PixArtControlNetAdapterModel"}, weights)
        config = config or pixart_control.config_of(tensors, weights)
        return family, pixart_control.OFFICIAL, config
    if controlnet_xs.is_official(tensors) or controlnet_xs.is_research(tensors):
        family = families.family_of({"_class_name": "ControlNetXSAdapter"}, weights)
        if controlnet_xs.is_official(tensors):
            config = config or controlnet_xs.config_of(tensors, weights)
            return family, controlnet_xs.official, config
        known = controlnet_xs.of_research(config) if config else None
        return family, controlnet_xs.research, known or controlnet_xs.config_of(tensors, weights)
    if not config:
        raise ConfigError(
            "a weight file without a config, and none of the known official files",
            weights,
            "give `config`: a dict or a config.json that has `_class_name` or `architectures`",
        )
    family = families.family_of(config, where)
    return family, family.table, config


def component_directory(path, component):
    """The directory of one component, the only one or named; lists them where that is open."""
    if component in (None, *fused.TABLES) and (path / "config.json").is_file():
        return path
    names = sorted(p.parent.name for p in path.glob("*/config.json"))
    if component is None and len(names) == 1 and not (path / "model_index.json").is_file():
        return path / names[0]  # the export of a controller's run
    if component is None and not names:
        fix = "give the directory of one network, or of a pipeline"
        raise ConfigError("the directory has no config.json", str(path), fix)
    if component is None:
        what = f"the directory holds several components: {', '.join(names)}"
        raise ConfigError(what, str(path), "give one of them as `component`, or its directory")
    if component in names:
        return path / component
    what = f"no component {component!r}, there are: {', '.join(names) or 'none'}."
    raise ConfigError(what + did_you_mean(component, names), str(path))


def check_dtype(dtype):
    """A floating numpy dtype, or None."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}, expected one of {', '.join(DTYPES)}", "dtype")
    return found


def load_null_caption(path, component=None):
    """PixArt's learned unconditional caption, float32 [L, caption_channels], or None.

    Args:
        path: what `load_model` takes. An official file has the caption inside, a component or
            pipeline directory has it in `null_caption.safetensors`.
    """
    path = Path(path)
    if not path.is_dir():
        tensors, _ = read_component(path, component)
        if not pixart.is_official(tensors):
            return None
        return rules.side_tensors(tensors, pixart.OFFICIAL).get(pixart.NULL_CAPTION)
    for file in (path / (component or "") / NULL_FILE, path / NULL_FILE, path.parent / NULL_FILE):
        if file.is_file():
            return check_null(files.read_tensors(file), file)
    return None


def check_null(tensors, file):
    """The caption in a side file: [L, D] and finite."""
    null = tensors.get(pixart.NULL_CAPTION)
    if null is None or null.ndim != 2 or not np.isfinite(null.astype(np.float32)).all():
        got = {key: value.shape for key, value in tensors.items()}
        raise CheckpointError(f"expected a finite null_caption [L, D], got {got}", str(file))
    return np.array(null, np.float32)


def save_model(module, params, directory, dtype=None, null_caption=None):
    """Writes `config.json` and safetensors in diffusers'/transformers' layout.

    Args:
        directory: made if it is not there.
        dtype: "bfloat16" or "float32" for the stored weights; None: as they are.
        null_caption: [L, D], PixArt's learned unconditional caption, into a side file.

    Raises CheckpointError if the disk refuses or reads back something else.
    """
    if getattr(module, "quantization", None):
        fix = "save the pipeline that was loaded without `quantize`"
        raise ConfigError("int8 weights have no place in this layout", "save_model", fix)
    family, directory = families.family_of_module(module), Path(directory)
    tensors = rules.to_tensors(params, family.save_table or family.table)
    make_directory(directory)
    files.write_safetensors(directory / f"{family.stem}.safetensors", tensors, dtype=dtype)
    if null_caption is not None:
        side = {pixart.NULL_CAPTION: np.asarray(null_caption)}
        files.write_safetensors(directory / NULL_FILE, side)
    write_json(directory / "config.json", families.config_of(module))


def save_official(module, params, file, dtype=None, null_caption=None):
    """Writes PixArt's own layout: `.pth` (needs PyTorch) or `.safetensors`.

    A controlled PixArt goes into one file, base and control. The position table, which the
    official code deletes on loading, is written with it.
    """
    tensors, file = official_tensors(module, params, null_caption), Path(file)
    make_directory(file.parent)
    if file.suffix == ".safetensors":
        files.write_safetensors(file, tensors, dtype=dtype)
    elif file.suffix == ".pth":
        write_pth(file, tensors, dtype)
    else:
        raise ConfigError(f"{file.name!r} ends in neither .pth nor .safetensors", "DST")


def official_tensors(module, params, null_caption=None):
    """{official key: array} of a PixArt, or of a controlled one."""
    name = type(module).__name__
    if name == "ControlledPixArt":
        base = official_tensors(module.base, params["base"], null_caption)
        control = rules.to_tensors(params["control"], pixart_control.OFFICIAL)
        return pixart_control.join(base, control)
    if name == "ControlNetXS":
        return controlnet_xs.official_tensors(module, params)
    if name != "PixArt":
        raise ConfigError(f"there is no official layout of {name}", "--to")
    side = {} if null_caption is None else {pixart.NULL_CAPTION: null_caption}
    tensors = rules.to_tensors(params, pixart.OFFICIAL, side)
    return {**tensors, "pos_embed": position_table(module)}


def position_table(module):
    """The sine-cosine table of the square grid, [1, N, D]."""
    from cnxs_jax.models.attention import sincos_2d

    side = module.sample_size // module.patch_size
    scale = module.interpolation_scale or max(module.sample_size // 64, 1)
    return np.asarray(sincos_2d(module.features, side, side, side, scale), np.float32)[None]


def write_pth(file, tensors, dtype):
    """`{"state_dict": tensors}` by PyTorch, which is imported here only."""
    try:
        import torch
    except ImportError:
        fix = "install PyTorch, or let DST end in .safetensors"
        raise ConfigError("writing a .pth needs PyTorch", str(file), fix) from None
    kind = None if dtype is None else getattr(torch, np.dtype(dtype).name)
    state = {k: torch.from_numpy(np.array(v, np.float32)).to(kind) for k, v in tensors.items()}
    with replacing(file) as part, part.open("wb") as out:
        torch.save({"state_dict": state}, out)


def make_directory(directory):
    """Makes it with its parents; CheckpointError where that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the directory: {error}", str(directory)) from None

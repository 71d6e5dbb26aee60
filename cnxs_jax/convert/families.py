"""Which file belongs to which module: class names, tables, configs. Modules are imported late."""

import dataclasses
import importlib
import types
import typing

import jax

from cnxs_jax.convert import (
    clip,
    controlnet_xs,
    examples,
    pixart,
    pixart_control,
    t5,
    unet,
    vae,
)
from cnxs_jax.convert.rules import Table
from cnxs_jax.errors import CnxsError, ConfigError, did_you_mean

# Fields that say how to compute and not what: no part of a config.json.
RUNTIME = (
    *("parent", "name", "dtype", "remat", "attention_impl", "quantization"),
    *("resnet_eps", "attention_eps", "compat"),  # `control.attach` sets them
)
MAX_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of network and its files.

    Args:
        classes: `_class_name` or `architectures` values; the first one is written.
        module: "package.file:Class".
        table: what reads this family's diffusers/transformers files.
        save_table: what writes them, where it is another.
        example: module -> arguments for `init`, as small as they can be.
        supported: {config key: allowed values}; anything else would compute something different.
        extras: module -> config keys without a field, written for the PyTorch side.
        stem: name of the weight file.
    """

    classes: tuple
    module: str
    table: Table
    example: typing.Callable
    supported: dict
    extras: typing.Callable
    stem: str = "diffusion_pytorch_model"
    save_table: Table | None = None

    def load(self):
        """The module class."""
        package, name = self.module.split(":")
        return getattr(importlib.import_module(package), name)


FAMILIES = (
    Family(
        ("PixArtTransformer2DModel", "Transformer2DModel"),
        "cnxs_jax.models.dit:PixArt",
        pixart.DIFFUSERS,
        examples.pixart_example,
        supported={
            "norm_type": ("ada_norm_single",),
            "activation_fn": ("gelu-approximate",),
            "attention_bias": (True,),
            "norm_elementwise_affine": (False,),
            "norm_eps": (1e-6,),
            "attention_type": ("default",),
        },
        extras=examples.pixart_extras,
    ),
    Family(
        ("AutoencoderKL",),
        "cnxs_jax.models.vae:AutoencoderKL",
        vae.OLD_ATTENTION,
        examples.vae_example,
        supported={
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
            "act_fn": ("silu", "swish"),
            "latents_mean": (None,),
            "latents_std": (None,),
        },
        extras=examples.vae_extras,
        save_table=vae.DIFFUSERS,
    ),
    Family(
        ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model"),
        "cnxs_jax.models.t5:T5Encoder",
        t5.TRANSFORMERS,
        examples.t5_example,
        supported={"model_type": ("t5",)},
        extras=examples.t5_extras,
        stem="model",
    ),
    Family(
        ("PixArtControlNetAdapterModel",),
        "cnxs_jax.control.controlnet_transformer:ControlNetTransformer",
        pixart_control.DIFFUSERS,
        examples.pixart_control_example,
        supported={},
        extras=lambda module: {},
    ),
    Family(
        ("UNet2DConditionModel",),
        "cnxs_jax.models.unet:UNet",
        unet.DIFFUSERS,
        examples.unet_example,
        supported=unet.SUPPORTED,
        extras=examples.unet_extras,
    ),
    Family(
        ("ControlNetXSAdapter",),
        "cnxs_jax.control.controlnet_xs:ControlNetXS",
        controlnet_xs.DIFFUSERS,
        examples.controlnet_xs_example,
        supported={},
        extras=lambda module: {},
    ),
    Family(
        ("ControlNetModel",),
        "cnxs_jax.control.controlnet:ControlNet",
        unet.DIFFUSERS,
        examples.controlnet_example,
        supported=unet.CONTROLNET,
        extras=lambda module: {key: values[0] for key, values in unet.CONTROLNET.items()},
    ),
    Family(
        ("CLIPTextModel",),
        "cnxs_jax.models.clip:CLIPTextModel",
        clip.TEXT,
        examples.clip_text_example,
        supported={"model_type": ("clip_text_model",)},
        extras=examples.clip_text_extras,
        stem="model",
    ),
    Family(
        ("CLIPTextModelWithProjection",),
        "cnxs_jax.models.clip:CLIPTextModelWithProjection",
        clip.TEXT,
        examples.clip_text_example,
        supported={"model_type": ("clip_text_model",)},
        extras=examples.clip_text_extras,
        stem="model",
    ),
    Family(
        ("CLIPVisionModelWithProjection",),
        "cnxs_jax.models.clip:CLIPVisionModelWithProjection",
        clip.VISION,
        examples.clip_vision_example,
        supported={"model_type": ("clip_vision_model",)},
        extras=examples.clip_vision_extras,
        stem="model",
    ),
    Family(
        ("PixelUNet",),  # this library's own layout: nobody else has eDiff-I's networks
        "cnxs_jax.models.pixel_unet:PixelUNet",
        Table(),
        examples.pixel_unet_example,
        supported={},
        extras=lambda module: {},
    ),
    Family(
        ("StyleWords",),  # this library's own, too
        "cnxs_jax.models.style_words:StyleWords",
        Table(),
        examples.style_words_example,
        supported={},
        extras=lambda module: {},
    ),
)


def family_of(config, where):
    """The family that a config.json names. Raises ConfigError."""
    name = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    for family in FAMILIES:
        if name in family.classes:
            return family
    known = [name for family in FAMILIES for name in family.classes]
    what = f"unknown model class {name!r}, known: {', '.join(known)}."
    raise ConfigError(what + did_you_mean(name, known), where)


def family_of_module(module):
    """The family of a module instance. Raises ConfigError."""
    family = known_family(module)
    if family is None:
        raise ConfigError(f"no file layout is known for {type(module).__name__}")
    return family


def known_family(module):
    """The family of a module instance, or None."""
    name = f"{type(module).__module__}:{type(module).__name__}"
    return next((family for family in FAMILIES if family.module == name), None)


def build(family, config, where, dtype=None):
    """`(module, target)`: the module of a config and the shapes of its parameters.

    Config keys that are no fields are ignored. Raises ConfigError for values that this module
    cannot honour.
    """
    check_supported(config, family.supported, where)
    cls = family.load()
    fields = {
        f.name: check_value(f.name, config[f.name], f.type, where)
        for f in dataclasses.fields(cls)
        if f.name not in RUNTIME and f.name in config
    }
    if dtype is not None:
        fields["dtype"] = dtype
    try:
        module = cls(**fields)
        target = shapes(module)
    except CnxsError:
        raise
    except Exception as error:  # whatever flax or jax say to impossible sizes
        raise ConfigError(f"no model of this config: {str(error)[:300]}", where) from None
    return module, target


def check_supported(config, supported, where):
    """Raises ConfigError for a value of a config that is not among those of {key: allowed}."""
    for key, allowed in supported.items():
        given = config.get(key, allowed[0])
        values = given if isinstance(given, list | tuple) else [given]
        bad = [v for v in values if v not in allowed]
        if bad:
            raise ConfigError(f"{key} = {bad[0]!r} is not supported, only {allowed}", where)


def shapes(module):
    """The shapes of a module's parameters; nothing is allocated."""
    example = family_of_module(module).example
    init = jax.eval_shape(lambda: module.init(jax.random.key(0), *example(module)))
    return init["params"]


def check_value(name, value, annotation, where):
    """The value as the field wants it; lists become tuples."""
    union = isinstance(annotation, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    kinds = tuple(typing.get_origin(k) or k for k in kinds)
    if isinstance(value, list):
        value = tuple(value)
    whole = value if isinstance(value, tuple) else (value,)
    right = any(isinstance(k, type) and isinstance(value, k) for k in kinds)
    if isinstance(value, int) and float in kinds:
        right = True
    if isinstance(value, bool) and bool not in kinds:
        right = False
    # Every integer of these configs counts something.
    small = all(1 <= v < 2**24 for v in whole if type(v) is int)
    if "layers" in name:
        small = small and all(v <= MAX_LAYERS for v in whole if type(v) is int)
    if not right or not small:
        names = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
        raise ConfigError(f"{name} = {value!r}, expected {names} of a sensible size", where)
    return value


def config_of(module):
    """The config.json of a module, with the class name of its PyTorch counterpart."""
    family = family_of_module(module)
    fields = {
        f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in RUNTIME
    }
    if family.stem == "model":
        head = {"architectures": [family.classes[0]]}
    else:
        head = {"_class_name": family.classes[0]}
    return {**head, **family.extras(module), **fields}

"""Single files of Stable Diffusion: all networks under the original (LDM, SGM) names in one.

A component lies under a prefix, the same names inside whatever the file; which prefix the text
encoders have tells the kind of model. Schedules, EMA copies and losses that training left in a
file are no part of a component and not read.
"""

import dataclasses
import typing

from cnxs_jax.convert import clip, unet, vae
from cnxs_jax.errors import ConfigError, did_you_mean

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_SHARED = {"unet": unet.LDM_PREFIX, "vae": "first_stage_model."}
# {kind: {component: prefix}}; the kinds are those of `unet.PUBLISHED`.
LAYOUTS = {
    "sdxl": _SHARED
    | {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl_refiner": _SHARED | {"text_encoder_2": "conditioner.embedders.0.model."},
    "sd15": _SHARED | {"text_encoder": "cond_stage_model.transformer."},
    "sd21": _SHARED | {"text_encoder": "cond_stage_model.model."},
}
_CLIP_L = {"hidden_act": "quick_gelu"}  # the fields' defaults
_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_VAE_XL = {"scaling_factor": 0.13025}
_OTHERS = {
    "sd15": {"vae": {}, "text_encoder": _CLIP_L},
    "sd21": {"vae": {}, "text_encoder": _CLIP_H},
    "sdxl": {"vae": _VAE_XL, "text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G},
    "sdxl_refiner": {"vae": _VAE_XL, "text_encoder_2": _CLIP_G},
}
CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
# A tensor of each published component and its shape, without the prefix.
_PROBES = {
    "unet": ("input_blocks.0.0.weight", {"sdxl_refiner": (384, 4, 3, 3), None: (320, 4, 3, 3)}),
    "vae": ("encoder.conv_in.weight", {None: (128, 3, 3, 3)}),
    "text_encoder": (
        ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        {"sd21": (49408, 1024), None: (49408, 768)},
    ),
    "text_encoder_2": ("token_embedding.weight", {None: (49408, 1280)}),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One component of a single file.

    Attributes:
        kind: a key of `LAYOUTS`.
        component: a key of `LAYOUTS[kind]`.
        tensors: {original name without the prefix: array}.
    """

    kind: str
    component: str
    tensors: dict

    @property
    def class_name(self):
        """The class of diffusers or transformers."""
        return CLASSES[self.component]

    def config(self, where):
        """The published config; ConfigError where these are no tensors of a published size."""
        names, shapes = _PROBES[self.component]
        names = (names,) if isinstance(names, str) else names
        found = next((self.tensors[n].shape for n in names if n in self.tensors), None)
        if found != shapes.get(self.kind, shapes[None]):
            raise ConfigError(
                f"no published {self.component}: {names[0]} has shape {found}",
                where,
                "give `config`, a dict or a config.json with diffusers' names",
            )
        return published(self.kind, self.component)

    def table(self, module):
        """The rule table of this component for its module."""
        return table_of(self.kind, self.component, module)


def published(kind, component):
    """The config of a published component where it differs from the fields' defaults."""
    return unet.PUBLISHED[kind] if component == "unet" else _OTHERS[kind][component]


def table_of(kind: str, component: str, module: typing.Any):
    """The rule table of a component, names without the prefix."""
    if component == "unet":
        return unet.ldm(module)
    if component == "vae":
        return vae.ldm(module)
    openai = LAYOUTS[kind][component].endswith("transformer.")
    return clip.TEXT if openai else clip.open_clip(module)


def kind_of(tensors):
    """The kind of a single file, by the prefix of its text encoder; None for any other file."""
    if not any(name.startswith(unet.LDM_PREFIX) for name in tensors):
        return None
    for kind, prefixes in LAYOUTS.items():
        wanted = prefixes.get("text_encoder_2") or prefixes["text_encoder"]
        if any(name.startswith(wanted) for name in tensors):
            return kind
    return None


def part_of(tensors, component, where):
    """The `Part` of a single file, or None if it is another kind of file.

    Raises:
        ConfigError: `component` names none of its networks.
    """
    kind = kind_of(tensors)
    if kind is None:
        return None
    if component not in LAYOUTS[kind]:
        names = ", ".join(LAYOUTS[kind])
        what = f"the file holds several components: {names}"
        if component is not None:
            what = f"the file has no component {component!r}, there are: {names}."
            what += did_you_mean(component, LAYOUTS[kind])
        raise ConfigError(what, where, "give one of them as `component`")
    prefix = LAYOUTS[kind][component]
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return Part(kind, component, own)


def join(kind, parts):
    """The tensors of a single file from {component: tensors without prefix}.

    Raises:
        ConfigError: the components are not those of the kind.
    """
    if set(parts) != set(LAYOUTS[kind]):
        raise ConfigError(
            f"{kind} has the components {', '.join(LAYOUTS[kind])}, got {', '.join(parts)}",
            "single file",
        )
    return {LAYOUTS[kind][name] + k: v for name, part in parts.items() for k, v in part.items()}

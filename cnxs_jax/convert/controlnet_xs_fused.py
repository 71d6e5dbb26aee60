"""`UNetControlNetXSModel`: a UNet and a ControlNet-XS in one set of tensors and one config.

Training with diffusers saves only this. `split` makes the two networks' own layouts of it,
`join` one model of two; nothing is computed, no tensor changes.
"""

from cnxs_jax.convert.rules import Problems, Rule, Table, from_diffusers, to_diffusers
from cnxs_jax.errors import ConfigError

CLASS = "UNetControlNetXSModel"
BASE, CONTROL = "unet", "controlnet"

_BASE = {
    "base_conv_in.{p}": "conv_in.{p}",
    "base_conv_norm_out.{p}": "conv_norm_out.{p}",
    "base_conv_out.{p}": "conv_out.{p}",
    "base_time_embedding.{rest}": "time_embedding.{rest}",
    "base_add_embedding.{rest}": "add_embedding.{rest}",
    "down_blocks.{n}.base_resnets.{rest}": "down_blocks.{n}.resnets.{rest}",
    "down_blocks.{n}.base_attentions.{rest}": "down_blocks.{n}.attentions.{rest}",
    "down_blocks.{n}.base_downsamplers.conv.{p}": "down_blocks.{n}.downsamplers.0.conv.{p}",
    "mid_block.base_midblock.{rest}": "mid_block.{rest}",
    "up_blocks.{n}.resnets.{rest}": "up_blocks.{n}.resnets.{rest}",
    "up_blocks.{n}.attentions.{rest}": "up_blocks.{n}.attentions.{rest}",
    "up_blocks.{n}.upsamplers.conv.{p}": "up_blocks.{n}.upsamplers.0.conv.{p}",
}
_CONTROL = {
    "ctrl_conv_in.{p}": "conv_in.{p}",
    "ctrl_time_embedding.{rest}": "time_embedding.{rest}",
    "controlnet_cond_embedding.{rest}": "controlnet_cond_embedding.{rest}",
    "control_to_base_for_conv_in.{p}": "control_to_base_for_conv_in.{p}",
    "down_blocks.{n}.ctrl_resnets.{rest}": "down_blocks.{n}.resnets.{rest}",
    "down_blocks.{n}.ctrl_attentions.{rest}": "down_blocks.{n}.attentions.{rest}",
    "down_blocks.{n}.ctrl_downsamplers.conv.{p}": "down_blocks.{n}.downsamplers.conv.{p}",
    "down_blocks.{n}.base_to_ctrl.{rest}": "down_blocks.{n}.base_to_ctrl.{rest}",
    "down_blocks.{n}.ctrl_to_base.{rest}": "down_blocks.{n}.ctrl_to_base.{rest}",
    "mid_block.ctrl_midblock.{rest}": "mid_block.midblock.{rest}",
    "mid_block.base_to_ctrl.{p}": "mid_block.base_to_ctrl.{p}",
    "mid_block.ctrl_to_base.{p}": "mid_block.ctrl_to_base.{p}",
    "up_blocks.{n}.ctrl_to_base.{rest}": "up_connections.{n}.ctrl_to_base.{rest}",
}
TABLES = {
    BASE: Table(tuple(Rule(old, (new,)) for old, new in _BASE.items())),
    CONTROL: Table(tuple(Rule(old, (new,)) for old, new in _CONTROL.items())),
}

# Config keys: of the base under the same name, and {fused: adapter's}.
BASE_KEYS = (
    *("sample_size", "down_block_types", "up_block_types", "block_out_channels"),
    *("norm_num_groups", "cross_attention_dim", "transformer_layers_per_block"),
    *("addition_embed_type", "addition_time_embed_dim", "upcast_attention"),
    *("use_linear_projection", "time_cond_proj_dim", "projection_class_embeddings_input_dim"),
)
CONTROL_KEYS = {
    "time_embedding_mix": "time_embedding_mix",
    **{
        f"ctrl_{key}": key
        for key in (
            *("conditioning_channels", "conditioning_embedding_out_channels"),
            *("conditioning_channel_order", "learn_time_embedding", "block_out_channels"),
            *("num_attention_heads", "max_norm_num_groups"),
        )
    },
}
SHARED = (  # config keys that the adapter takes from the base
    *("cross_attention_dim", "down_block_types", "sample_size", "upcast_attention"),
    *("transformer_layers_per_block", "use_linear_projection"),
)
DEFAULTS = {  # of the fused class where they are not those of the two
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
    "sample_size": 96,
    "num_attention_heads": 8,
}

FIXED = {  # of the fused class, which has no key for them
    BASE: {
        **{"layers_per_block": 2, "in_channels": 4, "out_channels": 4},
        **{"mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5},
    },
    CONTROL: {
        **{"control_type": "B", "infusion": "cat", "attention_head_width": None},
        **{"layers_per_block": 2, "in_channels": 4},
    },
}
# Keys that say nothing about what is computed, of which the fused model has only the base's.
NO_EFFECT = {"_class_name", "sample_size", "upcast_attention"}


def is_fused(tensors):
    """Whether these are the names of a fused model."""
    return "base_conv_in.weight" in tensors and "ctrl_conv_in.weight" in tensors


def split(tensors, where="weights"):
    """{"unet": ..., "controlnet": ...}: the tensors of both in diffusers' layouts.

    Raises CheckpointError naming every tensor that belongs to neither.
    """
    problems, parts, rest = Problems(where), {}, tensors
    for name, table in TABLES.items():
        named, unknown = to_diffusers(rest, table, problems)
        parts[name] = {key: array for key, (_, array) in named.items()}
        rest = {key: tensors[key] for key in unknown}
    for key in rest:
        problems.add("tensors of neither base nor controller", key, list(tensors))
    problems.check()
    return parts


def join(base, control, where="parameters"):
    """The tensors of a fused model from both networks' in diffusers' layouts."""
    problems = Problems(where)
    parts = {BASE: base, CONTROL: control}
    joined = {}
    for name, tensors in parts.items():
        joined |= from_diffusers(tensors, TABLES[name], problems)
    problems.check()
    return joined


def split_config(config):
    """{"unet": config, "controlnet": config} of a fused model's config.json."""
    given = DEFAULTS | config
    base = {key: given[key] for key in BASE_KEYS if key in given}
    control = {new: given[old] for old, new in CONTROL_KEYS.items() if old in given}
    control |= {key: given[key] for key in SHARED if key in given}
    base |= {"attention_head_dim": given["num_attention_heads"]}
    control |= {"base_block_out_channels": given["block_out_channels"]}
    return {
        BASE: {"_class_name": "UNet2DConditionModel", **base},
        CONTROL: {"_class_name": "ControlNetXSAdapter", **control},
    }


def join_config(base, control):
    """The fused model's config of a base's and an adapter's; `split_config` gives both back.

    Raises ConfigError for what the fused model cannot be: another type than B with concatenation,
    other than two resnets a level, other than 4 latent channels, an adapter of another base.
    """
    fused = {key: base[key] for key in BASE_KEYS if key in base}
    fused |= {old: control[new] for old, new in CONTROL_KEYS.items() if new in control}
    fused |= {"_class_name": CLASS, "num_attention_heads": base["attention_head_dim"]}
    parts, levels = split_config(fused), len(base["block_out_channels"])
    problems = []
    for name, given in ((BASE, base), (CONTROL, control)):
        held = FIXED[name] | parts[name]
        for key in sorted(given.keys() & held.keys() - NO_EFFECT):
            if _one_each(given[key], levels) != _one_each(held[key], levels):
                beside = f" (the base: {held[key]!r})" if key not in FIXED[name] else ""
                problems.append(f"{key} = {given[key]!r}{beside}")
    if problems:
        what = f"diffusers' fused model cannot hold {', '.join(problems)}"
        raise ConfigError(what, CLASS, "save base and controller on their own")
    return fused


def _one_each(value, levels):
    """A value that may be one for all levels, so that both spellings compare as equal."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * levels

"""ControlNet-XS: its four key layouts, and the configs that go with them.

- diffusers: the adapter alone (`ControlNetXSAdapter`); our parameters carry these names.
- official: the adapter in the original names, which number the stages of the network, so that the
  table is made for a module. The files hold a buffer and unused tensors, too: see `unused`.
- research: the adapter as diffusers had it from 0.24 to 0.26 (`ControlNetXSModel`).
- fused: base and adapter in one model (`UNetControlNetXSModel`), which training with diffusers
  saves: `controlnet_xs_fused`.
"""

import math
import re

import numpy as np

from cnxs_jax import tree
from cnxs_jax.convert import unet
from cnxs_jax.convert.rules import Rule, Table, to_tensors
from cnxs_jax.errors import CheckpointError, ConfigError

DIFFUSERS = Table()
SCALES = "scale_list"  # official: a factor for each connection, all 1 in the published files
ENCODER, MIDDLE = "control_model.input_blocks", "control_model.middle_block"
HINT = "input_hint_block"

# What differs between the layouts' names of the zero convolutions, which both count by stages.
OFFICIAL_CONVS = {
    "down_out": "enc_zero_convs_out.{}.0",
    "down_in": "enc_zero_convs_in.{}.0",
    "mid_out": "middle_block_out.0",
    "up_out": "dec_zero_convs_out.{}.0",
}
RESEARCH_CONVS = {
    "down_out": "down_zero_convs_out.{}",
    "down_in": "down_zero_convs_in.{}",
    "mid_out": "middle_block_out",
    "up_out": "up_zero_convs_out.{}",
}
RESEARCH_TIME = "control_model.time_embedding."
RESEARCH = {
    "control_model.conv_in.{p}": "conv_in.{p}",
    "control_model.down_blocks.{n}.resnets.{rest}": "down_blocks.{n}.resnets.{rest}",
    "control_model.down_blocks.{n}.attentions.{rest}": "down_blocks.{n}.attentions.{rest}",
    "control_model.down_blocks.{n}.downsamplers.0.{rest}": "down_blocks.{n}.downsamplers.{rest}",
    "control_model.mid_block.{rest}": "mid_block.midblock.{rest}",
    "controlnet_cond_embedding.{rest}": "controlnet_cond_embedding.{rest}",
}

# Configs of the published adapters, which their files do not hold.
_SD21 = {
    "block_out_channels": (4, 8, 16, 16),
    "num_attention_heads": (1, 1, 2, 2),
    "cross_attention_dim": 1024,
    "learn_time_embedding": True,
    "sample_size": 64,
}
_SD15 = {
    "block_out_channels": (64, 128, 256, 256),
    "num_attention_heads": 8,
    "cross_attention_dim": 768,
    "use_linear_projection": False,
    "sample_size": 64,
}
_SDXL = {
    "base_block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "sample_size": 128,
}
_SDXL20 = {"block_out_channels": (16, 32, 64), "num_attention_heads": (1, 1, 1)}
_SDXL48 = {
    "block_out_channels": (32, 64, 128),
    "num_attention_heads": (1, 1, 2),
    "learn_time_embedding": True,
}
PUBLISHED = {
    "sd21_14m": _SD21,
    "sd15_53m": _SD15,
    "sdxl_20m": _SDXL | _SDXL20,
    "sdxl_48m": _SDXL | _SDXL48,
}


def official(module):
    """The table of the original names for a `ControlNetXS`."""
    blocks = [*_encoder(module), *_middle(), *_decoder(module)]
    pairs = [pair for block in blocks for pair in block]
    pairs += [(f"{HINT}.{old}", f"controlnet_cond_embedding.{new}") for old, new in _hint(module)]
    pairs.append((f"{ENCODER}.0.0", "conv_in"))
    if module.learn_time_embedding:
        for old, new in (("0", "linear_1"), ("2", "linear_2")):
            pairs.append((f"control_model.time_embed.{old}", f"time_embedding.{new}"))
    names = [(old, new) if new[-1] == "}" else _with_parts(old, new) for old, new in pairs]
    names += _connections(module, OFFICIAL_CONVS)
    ignore = (r"control_model\.label_emb\..*", *_dead(module))
    return Table(_rules(names), side=((SCALES, SCALES),), ignore=ignore)


def research(module):
    """The table of the names of diffusers 0.24 to 0.26, for type B with concatenation."""
    names, ignore = list(RESEARCH.items()), (re.escape(RESEARCH_TIME) + ".*",)
    if module.learn_time_embedding:
        names.append((RESEARCH_TIME + "{rest}", "time_embedding.{rest}"))
        ignore = ()
    return Table(_rules([*names, *_connections(module, RESEARCH_CONVS)]), ignore=ignore)


def research_tensors(module, params):
    """{name of diffusers 0.24 to 0.26: array} of an adapter.

    That class has its own time embedding even where the base's is shared, and does not open a file
    without one: zeros then, which nothing reads.
    """
    tensors = to_tensors(params, research(module))
    if not module.learn_time_embedding:
        features = module.base_block_out_channels[0]
        for name, inputs in (("linear_1", features), ("linear_2", 4 * features)):
            weight = np.zeros((4 * features, inputs), np.float32)
            tensors[f"{RESEARCH_TIME}{name}.weight"] = weight
            tensors[f"{RESEARCH_TIME}{name}.bias"] = weight[:, 0].copy()
    return tensors


def unused(tensors, table):
    """Names of the tensors that no layer reads, in order: in sdxl_48m 4 of `label_emb`."""
    return sorted(key for key in tensors if tree.matches(table.ignore, key))


def official_tensors(module, params):
    """{original name: array} of an adapter, with the list of scales that the original has."""
    n = len(module.up_stages)
    scales = np.ones(n + 1 if module.control_type == "A" else 2 * n + 1, np.float32)
    return to_tensors(params, official(module), {SCALES: scales})


def is_official(tensors):
    """Whether these are original names."""
    return f"{ENCODER}.0.0.weight" in tensors and f"{HINT}.0.weight" in tensors


def is_research(tensors):
    """Whether these are the names of diffusers 0.24 to 0.26."""
    return "control_model.conv_in.weight" in tensors and "down_zero_convs_in.0.weight" in tensors


def config_of(tensors, where):
    """The config of a published adapter, read off its tensors in the original or older names.

    Raises CheckpointError for other sizes.
    """
    keys = [
        k for k in tensors if k.startswith("control_model.") and k.endswith("attn2.to_k.weight")
    ]
    first = "input_blocks.0.0" if is_official(tensors) else "conv_in"
    width = tensors[f"control_model.{first}.weight"].shape[0]
    text = tensors[keys[0]].shape[-1] if keys else 0
    for config in PUBLISHED.values():
        if (config["block_out_channels"][0], config["cross_attention_dim"]) == (width, text):
            return config
    raise CheckpointError(
        f"no published ControlNet-XS: {width} channels, text of width {text}",
        where,
        "give `config`, with the fields of cnxs_jax.control.controlnet_xs.ControlNetXS",
    )


# Config keys of the older class: under the same name, and {older: current}.
RESEARCH_KEYS = (
    *("conditioning_channels", "conditioning_embedding_out_channels", "time_embedding_mix"),
    *("sample_size", "down_block_types", "block_out_channels", "cross_attention_dim"),
    *("transformer_layers_per_block", "num_attention_heads", "upcast_attention"),
)
RESEARCH_RENAMED = {
    "learn_embedding": "learn_time_embedding",
    "controlnet_conditioning_channel_order": "conditioning_channel_order",
}


def of_research(config):
    """The adapter's config of the older class's (`ControlNetXSModel`)."""
    found = {key: config[key] for key in RESEARCH_KEYS if key in config}
    found |= {new: config[old] for old, new in RESEARCH_RENAMED.items() if old in config}
    if "base_model_channel_sizes" in config:  # (in, out) of conv_in, then of every layer
        after = [pair[1] for pair in config["base_model_channel_sizes"]["down"]]
        found["base_block_out_channels"] = after[1::3]  # the first resnet's of each level
    return {"_class_name": "ControlNetXSAdapter", **found}


RESEARCH_FIXED = {  # of the older class, which has no key for them
    "control_type": "B",
    "infusion": "cat",
    "attention_head_width": None,
    "use_linear_projection": True,
    "layers_per_block": 2,
    "in_channels": 4,
    "max_norm_num_groups": 32,
}


def to_research(module):
    """The older class's config of an adapter, which `of_research` reads back.

    Raises ConfigError for an adapter that it cannot be: another computation would be read.
    """
    given = {key: set(module.per_level(getattr(module, key))) for key in RESEARCH_FIXED}
    wrong = [
        f"{key} = {getattr(module, key)!r}"
        for key, value in RESEARCH_FIXED.items()
        if given[key] != {value}
    ]
    if wrong:
        what = f"diffusers 0.24 to 0.26 cannot hold {', '.join(wrong)}"
        raise ConfigError(what, "ControlNetXSModel", "write another layout")
    base = module.base_block_out_channels
    # It must divide all channels, or the class cannot be made; then each norm gets its own number.
    common = math.gcd(*module.block_out_channels, *base)
    return {
        "_class_name": "ControlNetXSModel",
        **{key: getattr(module, key) for key in RESEARCH_KEYS},
        **{old: getattr(module, new) for old, new in RESEARCH_RENAMED.items()},
        "up_block_types": [n.replace("Down", "Up") for n in module.down_block_types[::-1]],
        "norm_num_groups": max(n for n in range(1, 33) if common % n == 0),
        "time_embedding_input_dim": base[0],
        "time_embedding_dim": 4 * base[0],
        "base_model_channel_sizes": _channel_sizes(module),
    }


def _channel_sizes(module):
    """(in, out) channels of the base's layers; the decoder's resnets read a skip, too."""
    base = module.base_block_out_channels
    after = [base[0], *(base[i] for i, _ in module.down_stages)]
    down = [(module.in_channels, after[0]), *zip(after, after[1:], strict=False)]
    outs = [base[::-1][i] for i, _ in module.up_stages]
    ins = [w + skip for w, skip in zip([base[-1], *outs], after[::-1], strict=False)]
    return {"down": down, "mid": [(base[-1],) * 2], "up": list(zip(ins, outs, strict=True))}


def _rules(names):
    return tuple(Rule(old, (new,)) for old, new in names)


def _with_parts(old, new):
    return f"{old}.{{p}}", f"{new}.{{p}}"


def _encoder(module):
    layers = module.per_level(module.layers_per_block)
    for n, (i, j) in enumerate(module.down_stages, 1):
        if j == layers[i]:
            yield [(f"{ENCODER}.{n}.0.op", f"down_blocks.{i}.downsamplers.conv")]
            continue
        yield unet.resnet_names(f"{ENCODER}.{n}.0", f"down_blocks.{i}.resnets.{j}")
        if module.down_block_types[i].startswith("CrossAttn"):
            yield unet.transformer_names(f"{ENCODER}.{n}.1", f"down_blocks.{i}.attentions.{j}")


def _middle():
    block = "mid_block.midblock"
    yield unet.resnet_names(f"{MIDDLE}.0", f"{block}.resnets.0")
    yield unet.transformer_names(f"{MIDDLE}.1", f"{block}.attentions.0")
    yield unet.resnet_names(f"{MIDDLE}.2", f"{block}.resnets.1")


def _decoder(module):
    """Type C: the control decoder; of its last stage and connection nothing comes (`_dead`)."""
    if module.control_type != "C":
        return
    stages, types = module.up_stages, module.down_block_types[::-1]
    for n, (i, j) in enumerate(stages[:-1]):
        old, attended = f"control_model.output_blocks.{n}", types[i].startswith("CrossAttn")
        yield unet.resnet_names(f"{old}.0", f"up_blocks.{i}.resnets.{j}")
        if stages[n + 1][0] > i:
            yield [(f"{old}.{1 + attended}.conv", f"up_blocks.{i}.upsamplers.0.conv")]
        if attended:
            yield unet.transformer_names(f"{old}.1", f"up_blocks.{i}.attentions.{j}")
        entry = "middle_block_in.0" if n == 0 else f"dec_zero_convs_in.{n - 1}.0"
        yield [(entry, f"up_blocks.{i}.base_to_ctrl.{j}")]


def _dead(module):
    if module.control_type != "C":
        return ()
    n = len(module.up_stages)
    convs = [f"control_model.output_blocks.{n - 1}", f"dec_zero_convs_out.{n - 1}"]
    convs += [f"dec_zero_convs_in.{n - 2}", f"dec_zero_convs_in.{n - 1}"]
    return tuple(re.escape(name) + r"\..*" for name in convs)


def _hint(module):
    """The layers of the hint embedding: every other one is a SiLU."""
    middle = 2 * (len(module.conditioning_embedding_out_channels) - 1)
    yield "0", "conv_in"
    yield from ((f"{2 * i + 2}", f"blocks.{i}") for i in range(middle))
    yield f"{2 * middle + 2}", "conv_out"


def _connections(module, convs):
    """The zero convolutions: `down_in` i lies before stage i + 1, the last before the middle."""
    pairs = [(convs["mid_out"], "mid_block.ctrl_to_base")]
    for n, (i, j) in enumerate(module.down_stages):
        pairs.append((convs["down_in"].format(n), f"down_blocks.{i}.base_to_ctrl.{j}"))
        if module.control_type != "A":
            pairs.append((convs["down_out"].format(n + 1), f"down_blocks.{i}.ctrl_to_base.{j}"))
    pairs.append((convs["down_in"].format(len(module.down_stages)), "mid_block.base_to_ctrl"))
    if module.control_type != "A":
        pairs.append((convs["down_out"].format(0), "control_to_base_for_conv_in"))
    block = "up_blocks" if module.control_type == "C" else "up_connections"
    stages = module.up_stages[:-1] if module.control_type == "C" else module.up_stages
    for n, (i, j) in enumerate(stages):
        pairs.append((convs["up_out"].format(n), f"{block}.{i}.ctrl_to_base.{j}"))
    return [_with_parts(old, new) for old, new in pairs]

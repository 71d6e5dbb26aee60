"""ControlNet-Transformer: the official `.pth` with base and control, and the diffusers adapter.

The official file holds the base under `base_model.` and the copies under `controlnet.`. The
diffusers layout (its research project and the community's adapters) holds the copies alone, under
`controlnet_blocks.`. The first zero linear belongs to block 0 in both; in our tree it has a place
of its own, because the blocks are stacked.
"""

import dataclasses

from cnxs_jax.convert import pixart
from cnxs_jax.convert.rules import Rule, Table
from cnxs_jax.errors import CheckpointError, ConfigError

BASE, CONTROL = "transformer", "controlnet"
PREFIXES = {BASE: "base_model.", CONTROL: "controlnet."}
FIRST = "controlnet_blocks.0.before_proj"

DIFFUSERS = Table(
    stacked=("controlnet_blocks",),
    paths=((f"{FIRST}.weight", "before_proj/kernel"), (f"{FIRST}.bias", "before_proj/bias")),
)


def copied(rule):
    """A rule of the base's blocks for the copies of them."""
    return Rule(
        rule.source.replace("blocks.{n}.", "{n}.copied_block.", 1),
        tuple(
            target.replace("transformer_blocks.{n}.", "controlnet_blocks.{n}.transformer_block.")
            for target in rule.targets
        ),
    )


# Without the prefix `controlnet.`, which `component_of` and `join` take off and put on.
OFFICIAL = dataclasses.replace(
    DIFFUSERS,
    rules=(
        Rule("0.before_proj.{p}", (f"{FIRST}.{{p}}",)),
        Rule("{n}.after_proj.{p}", ("controlnet_blocks.{n}.after_proj.{p}",)),
        *(copied(rule) for rule in pixart.OFFICIAL.rules if rule.source.startswith("blocks.")),
    ),
)


def is_joint(tensors):
    """Whether these are the names of an official file with base and control."""
    return f"{PREFIXES[BASE]}x_embedder.proj.weight" in tensors


def is_official(tensors):
    """Whether these are the control part of an official file."""
    return "0.before_proj.weight" in tensors and "0.copied_block.attn.qkv.weight" in tensors


def component_of(tensors, component, where):
    """The tensors of one component of a file with both, names without the prefix.

    A file with one network is given back as it is.

    Raises:
        ConfigError: the file has both and `component` names neither, or it has one only.
        CheckpointError: tensors that belong to neither.
    """
    if not is_joint(tensors):
        if component is not None:
            raise ConfigError(f"the file has no component {component!r}, it is one network", where)
        return tensors
    if component not in PREFIXES:
        raise ConfigError(
            f"the file holds several components: {', '.join(PREFIXES)}",
            where,
            "give one of them as `component`",
        )
    strange = sorted(k for k in tensors if not k.startswith(tuple(PREFIXES.values())))
    if strange:
        names = ", ".join(strange[:20])
        raise CheckpointError(f"{len(strange)} tensors of no component: {names}", where)
    prefix = PREFIXES[component]
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def join(base, control):
    """The tensors of an official file: base and control under their prefixes."""
    parts = {BASE: base, CONTROL: control}
    return {PREFIXES[name] + k: v for name, part in parts.items() for k, v in part.items()}


def config_of(tensors, where):
    """The adapter's config, read off a published file: copies of PixArt-XL/2's blocks."""
    width = tensors["0.before_proj.weight"].shape
    if width != (1152, 1152):
        raise CheckpointError(
            f"no published ControlNet-Transformer: width {width[0]}",
            where,
            "give `config` with num_layers, num_attention_heads and attention_head_dim",
        )
    return {"num_layers": len([k for k in tensors if k.endswith(".after_proj.weight")])}

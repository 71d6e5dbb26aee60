"""AutoencoderKL: diffusers names, those of its attention before version 0.18, and LDM's names."""

from cnxs_jax.convert.rules import Rule, Table

DIFFUSERS = Table()


def attention(old, new):
    """A projection of the middle block's attention; older files store it as a 1x1 convolution."""
    head = "{side}coder.mid_block.attentions.{n}"
    return Rule(f"{head}.{old}.{{p}}", (f"{head}.{new}.{{p}}",), squeeze=True)


# Reads files with the old and with the new names, writes the old ones.
OLD_ATTENTION = Table(
    rules=(
        attention("query", "to_q"),
        attention("key", "to_k"),
        attention("value", "to_v"),
        attention("proj_attn", "to_out.0"),
        Rule("{rest}", ("{rest}",)),
    )
)

# LDM stores the attention's projections as 1x1 convolutions.
LDM_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def ldm(module):
    """The table of the original (LDM) names for an `AutoencoderKL`, without a file's prefix.

    The decoder's levels are numbered from the highest resolution there and from the lowest here.
    """
    levels = len(module.block_out_channels)
    pairs = [*_resnets("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}")]
    pairs += [
        ("encoder.down.{i}.downsample.{rest}", "encoder.down_blocks.{i}.downsamplers.0.{rest}")
    ]
    for i in range(levels):
        old, new = f"decoder.up.{levels - 1 - i}", f"decoder.up_blocks.{i}"
        pairs += _resnets(f"{old}.block.{{j}}", f"{new}.resnets.{{j}}")
        pairs += [(f"{old}.upsample.{{rest}}", f"{new}.upsamplers.0.{{rest}}")]
    for i in range(2):
        old, new = f"{{side}}coder.mid.block_{i + 1}", f"{{side}}coder.mid_block.resnets.{i}"
        pairs += _resnets(old, new)
    pairs += [("{side}coder.norm_out.{p}", "{side}coder.conv_norm_out.{p}")]
    same = ["{side}coder.conv_in.{p}", "{side}coder.conv_out.{p}"]
    same += ["quant_conv.{p}", "post_quant_conv.{p}"]
    rules = [Rule(old, (new,)) for old, new in [*pairs, *zip(same, same, strict=True)]]
    return Table(rules=(*_ldm_attention(), *rules), ignore=(r"loss\..*",))


def _resnets(old, new):
    yield f"{old}.nin_shortcut.{{p}}", f"{new}.conv_shortcut.{{p}}"
    yield f"{old}.{{rest}}", f"{new}.{{rest}}"


def _ldm_attention():
    old, new = "{side}coder.mid.attn_1", "{side}coder.mid_block.attentions.0"
    yield Rule(f"{old}.norm.{{p}}", (f"{new}.group_norm.{{p}}",))
    for theirs, ours in LDM_ATTENTION.items():
        yield Rule(f"{old}.{theirs}.{{p}}", (f"{new}.{ours}.{{p}}",), conv=True)

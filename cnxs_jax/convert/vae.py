"""AutoencoderKL: diffusers names, and the attention names that it had before version 0.18."""

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

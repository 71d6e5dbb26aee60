"""The T5 encoder: transformers names <-> our tree.

The blocks are scanned, the relative position bias of the first block serves all of them and lies
outside the scan. Encoder-decoder files are read, too: their decoder is not part of this model.
"""

from cnxs_jax.convert.rules import Table

TRANSFORMERS = Table(
    stacked=("encoder/block",),
    paths=(
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder/relative_attention_bias/embedding",
        ),
    ),
    aliases=(("encoder.embed_tokens.weight", "shared.weight"),),
    ignore=(r"decoder\..*", r"lm_head\..*"),
)

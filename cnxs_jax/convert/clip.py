"""CLIP's encoders: transformers names <-> our tree.

The layers are scanned. A text encoder without projection has no `text_model.` before its names
where transformers 5 wrote it; it reads files of either kind, and version 4 only those with it, so
that is what is written. `position_ids` are constants that older files hold.
"""

from cnxs_jax.convert.rules import Rule, Table

TEXT = Table(
    rules=(
        Rule("text_model.{rest}", ("text_model.{rest}",)),
        Rule("text_projection.{p}", ("text_projection.{p}",)),
        Rule("{rest}", ("text_model.{rest}",)),
    ),
    stacked=("text_model/encoder/layers",),
    ignore=(r"(text_model\.)?embeddings\.position_ids",),
)

VISION = Table(
    stacked=("vision_model/encoder/layers",),
    ignore=(r"vision_model\.embeddings\.position_ids",),
)

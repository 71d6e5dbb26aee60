"""CLIP's encoders: transformers names and OpenCLIP's <-> our tree.

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

OPEN_CLIP_OUTSIDE = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.{p}": "final_layer_norm.{p}",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def open_clip(module):
    """The table of OpenCLIP's names for a text encoder, without a file's prefix.

    Files of Stable Diffusion 2 hold a last layer and a projection that it does not use and that
    transformers' class does not have: both are left out.
    """
    layer, old = "text_model.encoder.layers.{n}", "transformer.resblocks.{n}"
    pairs = [(name, f"text_model.{ours}") for name, ours in OPEN_CLIP_OUTSIDE.items()]
    pairs += [(f"{old}.{a}.{{p}}", f"{layer}.{b}.{{p}}") for a, b in OPEN_CLIP_LAYER.items()]
    rules = [Rule(name, (ours,)) for name, ours in pairs]
    for kind in ("weight", "bias"):
        parts = tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
        rules.append(Rule(f"{old}.attn.in_proj_{kind}", parts))
    ignore = ["logit_scale", "attn_mask"]
    if type(module).__name__ == "CLIPTextModelWithProjection":
        rules.append(Rule("text_projection", ("text_projection.weight",), transpose=True))
    else:
        unused = rf"transformer\.resblocks\.{module.num_hidden_layers}\..*"
        ignore += ["text_projection", unused]
    return Table(rules=tuple(rules), stacked=TEXT.stacked, ignore=tuple(ignore))

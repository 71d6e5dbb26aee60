"""PixArt-alpha: the official `.pth` layout <-> diffusers names <-> our tree.

q, k and v lie one after the other in `qkv`: the thirds are taken before the heads. The null
caption `y_embedder.y_embedding` [120, 4096] has no place in diffusers' layout, where it is lost and
with it the official form of guidance; here it is kept beside the parameters as `null_caption`.
"""

from cnxs_jax.convert.rules import Rule, Table
from cnxs_jax.errors import CheckpointError

STACKED = ("transformer_blocks",)
NULL_CAPTION = "null_caption"

DIFFUSERS = Table(stacked=STACKED)


def embedder(source, target):
    """The two linear layers of an embedder of scalars."""
    return (
        Rule(f"{source}.mlp.0.{{p}}", (f"adaln_single.emb.{target}.linear_1.{{p}}",)),
        Rule(f"{source}.mlp.2.{{p}}", (f"adaln_single.emb.{target}.linear_2.{{p}}",)),
    )


def block(source, *targets):
    """One tensor of a transformer block."""
    rename = tuple(f"transformer_blocks.{{n}}.{target}" for target in targets)
    return Rule(f"blocks.{{n}}.{source}", rename)


OFFICIAL = Table(
    rules=(
        Rule("x_embedder.proj.{p}", ("pos_embed.proj.{p}",)),
        Rule("y_embedder.y_proj.fc1.{p}", ("caption_projection.linear_1.{p}",)),
        Rule("y_embedder.y_proj.fc2.{p}", ("caption_projection.linear_2.{p}",)),
        *embedder("t_embedder", "timestep_embedder"),
        *embedder("csize_embedder", "resolution_embedder"),
        *embedder("ar_embedder", "aspect_ratio_embedder"),
        Rule("t_block.1.{p}", ("adaln_single.linear.{p}",)),
        block("attn.qkv.{p}", "attn1.to_q.{p}", "attn1.to_k.{p}", "attn1.to_v.{p}"),
        block("attn.proj.{p}", "attn1.to_out.0.{p}"),
        block("cross_attn.q_linear.{p}", "attn2.to_q.{p}"),
        block("cross_attn.kv_linear.{p}", "attn2.to_k.{p}", "attn2.to_v.{p}"),
        block("cross_attn.proj.{p}", "attn2.to_out.0.{p}"),
        block("mlp.fc1.{p}", "ff.net.0.proj.{p}"),
        block("mlp.fc2.{p}", "ff.net.2.{p}"),
        block("scale_shift_table", "scale_shift_table"),
        Rule("final_layer.linear.{p}", ("proj_out.{p}",)),
        Rule("final_layer.scale_shift_table", ("scale_shift_table",)),
    ),
    stacked=STACKED,
    side=(("y_embedder.y_embedding", NULL_CAPTION),),
    ignore=("pos_embed",),  # recomputed; several published files lack it
)


def is_official(tensors):
    """Whether these are the official layout's names."""
    return "x_embedder.proj.weight" in tensors and "t_block.1.weight" in tensors


def config_of(tensors, where):
    """diffusers' config of a published file, read off its shapes.

    Published are PixArt-XL/2 at 256 and 512 px and 1024-MS; anything else needs a config, because
    the number of heads and the position table's scale cannot be seen.
    """
    patch = tensors["x_embedder.proj.weight"].shape
    text = tensors.get("y_embedder.y_proj.fc1.weight")
    depth = len([k for k in tensors if k.startswith("blocks.") and k.endswith(".attn.qkv.weight")])
    multi_scale = "csize_embedder.mlp.0.weight" in tensors
    table = tensors.get("pos_embed")
    tokens = 64**2 if table is None and multi_scale else 0 if table is None else table.shape[-2]
    side = {16**2: 32, 32**2: 64, 64**2: 128}.get(tokens)
    known = patch == (1152, 4, 2, 2) and depth == 28 and text is not None
    if not known or text.shape[1] != 4096 or side is None:
        raise CheckpointError(
            f"no published PixArt: patches {patch}, {depth} blocks, {tokens or 'no'} positions",
            where,
            "give `config`, a dict or a config.json with diffusers' names",
        )
    return {
        "num_layers": depth,
        "sample_size": side,
        "use_additional_conditions": multi_scale,
        "caption_channels": text.shape[1],
    }

"""Weights of MiDaS's DPT-hybrid (`cnxs_jax.models.midas`): transformers' layout or the original.

ControlNet-XS's depth models follow maps of this network (arXiv 2312.06573). Its weights are
published as Intel/dpt-hybrid-midas on the hub, in transformers' layout, and as
`dpt_hybrid-midas-501f0c75.pt` by its authors. No package holds them.
"""

from pathlib import Path

import jax

from cnxs_jax.convert import families, files, rules
from cnxs_jax.convert.rules import Rule, Table
from cnxs_jax.errors import CheckpointError, CnxsError, ConfigError
from cnxs_jax.models.midas import BOTTLENECK, MULTIPLE, DPTHybrid

PACKAGE = None
INSTALL = (
    "give the path of MiDaS's DPT-hybrid: the directory of Intel/dpt-hybrid-midas from the hub, or "
    "the file dpt_hybrid-midas-501f0c75.pt"
)

# What this network computes; absent keys are the first ones.
SUPPORTED = {
    "model_type": ("dpt",),
    "is_hybrid": (True,),
    "hidden_act": ("gelu",),
    "num_channels": (3,),
    "patch_size": (16,),
    "qkv_bias": (True,),
    "readout_type": ("project",),
    "neck_ignore_stages": (0, 1),
    "head_in_index": (-1,),
    "add_projection": (False,),
    "use_batch_norm_in_fusion_residual": (False, None),
    "use_bias_in_fusion_residual": (None, True),
}
SUPPORTED_BACKBONE = {
    "model_type": ("bit",),
    "layer_type": ("bottleneck",),
    "global_padding": ("SAME", "same"),
    "embedding_dynamic_padding": (True,),
    "hidden_act": ("relu",),
    "num_channels": (3,),
    "output_stride": (32,),
    "width_factor": (1,),
    "out_features": ("stage1", "stage2", "stage3"),
}
FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("layer_norm_eps", "image_size", "neck_hidden_sizes", "fusion_hidden_size"),
)
BACKBONE_FIELDS = ("embedding_size", "depths", "num_groups")

STACKED = ("encoder/layers",)
LAYER = "encoder.layers.{n}"


def _rules(pairs):
    return tuple(Rule(source, (target,)) for source, target in pairs)


TRANSFORMERS = Table(
    rules=_rules(
        [
            ("dpt.embeddings.cls_token", "encoder.cls_token"),
            ("dpt.embeddings.position_embeddings", "encoder.position_embeddings"),
            ("dpt.embeddings.projection.{p}", "projection.{p}"),
            ("dpt.embeddings.backbone.bit.embedder.convolution.{p}", "backbone.stem.conv.{p}"),
            ("dpt.embeddings.backbone.bit.embedder.norm.{p}", "backbone.stem.norm.{p}"),
            ("dpt.embeddings.backbone.bit.encoder.{rest}", "backbone.{rest}"),
        ]
        + [
            (f"dpt.encoder.layer.{{n}}.{theirs}.{{p}}", f"{LAYER}.{ours}.{{p}}")
            for theirs, ours in (
                ("layernorm_before", "layer_norm1"),
                ("attention.attention.query", "self_attn.q_proj"),
                ("attention.attention.key", "self_attn.k_proj"),
                ("attention.attention.value", "self_attn.v_proj"),
                ("attention.output.dense", "self_attn.out_proj"),
                ("layernorm_after", "layer_norm2"),
                ("intermediate.dense", "mlp.fc1"),
                ("output.dense", "mlp.fc2"),
            )
        ]
        + [
            ("neck.reassemble_stage.readout_projects.{n}.0.{p}", "reassemble.{n}.readout.{p}"),
            ("neck.reassemble_stage.layers.{n}.{rest}", "reassemble.{n}.{rest}"),
            ("neck.convs.{n}.{p}", "convs.{n}.{p}"),
            ("neck.fusion_stage.layers.{n}.{rest}", "fusion.{n}.{rest}"),
            ("head.head.{n}.{p}", "head.conv.{n}.{p}"),
        ]
    ),
    stacked=STACKED,
    # Layers that the files have and whose results nothing reads.
    ignore=(r"dpt\.layernorm\..*", r"neck\.fusion_stage\.layers\.0\.residual_layer1\..*"),
)

# The names of timm's ViT and, below `scratch`, of the authors' code.
ORIGINAL = Table(
    rules=_rules(
        [
            ("pretrained.model.cls_token", "encoder.cls_token"),
            ("pretrained.model.pos_embed", "encoder.position_embeddings"),
            ("pretrained.model.patch_embed.proj.{p}", "projection.{p}"),
            ("pretrained.model.patch_embed.backbone.stem.{rest}", "backbone.stem.{rest}"),
            (
                "pretrained.model.patch_embed.backbone.stages.{n}.blocks.{m}.{rest}",
                "backbone.stages.{n}.layers.{m}.{rest}",
            ),
        ]
        + [
            (f"pretrained.model.blocks.{{n}}.{theirs}.{{p}}", f"{LAYER}.{ours}.{{p}}")
            for theirs, ours in (
                ("norm1", "layer_norm1"),
                ("attn.proj", "self_attn.out_proj"),
                ("norm2", "layer_norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            )
        ]
        + [
            ("pretrained.act_postprocess3.0.project.0.{p}", "reassemble.2.readout.{p}"),
            ("pretrained.act_postprocess4.0.project.0.{p}", "reassemble.3.readout.{p}"),
            ("pretrained.act_postprocess3.3.{p}", "reassemble.2.projection.{p}"),
            ("pretrained.act_postprocess4.3.{p}", "reassemble.3.projection.{p}"),
            ("pretrained.act_postprocess4.4.{p}", "reassemble.3.resize.{p}"),
        ]
        + [(f"scratch.layer{i + 1}_rn.{{p}}", f"convs.{i}.{{p}}") for i in range(4)]
        + [
            (f"scratch.refinenet{4 - i}.{theirs}.{{p}}", f"fusion.{i}.{ours}.{{p}}")
            for i in range(4)
            for theirs, ours in (
                ("out_conv", "projection"),
                ("resConfUnit1.conv1", "residual_layer1.convolution1"),
                ("resConfUnit1.conv2", "residual_layer1.convolution2"),
                ("resConfUnit2.conv1", "residual_layer2.convolution1"),
                ("resConfUnit2.conv2", "residual_layer2.convolution2"),
            )
        ]
        + [("scratch.output_conv.{n}.{p}", "head.conv.{n}.{p}")]
    )
    + tuple(
        Rule(
            f"pretrained.model.blocks.{{n}}.attn.qkv.{kind}",
            tuple(f"{LAYER}.self_attn.{part}_proj.{kind}" for part in "qkv"),
        )
        for kind in ("weight", "bias")
    ),
    stacked=STACKED,
    ignore=(r"pretrained\.model\.(norm|head)\..*", r"scratch\.refinenet4\.resConfUnit1\..*"),
)
# By a tensor that no other kind of DPT has.
LAYOUTS = {
    "dpt.embeddings.backbone.bit.embedder.convolution.weight": TRANSFORMERS,
    "pretrained.model.patch_embed.backbone.stem.conv.weight": ORIGINAL,
}


def find(path=None):
    """The weight file that `load` reads. Raises CheckpointError where there is none."""
    if path is None:
        raise CheckpointError("there are no MiDaS weights", "midas", INSTALL)
    path = Path(path)
    if not path.exists():
        raise CheckpointError("there is no such file or directory", str(path), INSTALL)
    return files.find_weights(path) if path.is_dir() else path


def config_file(weights):
    """The config.json beside a weight file, or None."""
    path = weights.parent / "config.json"
    return path if path.is_file() else None


def digest(path=None):
    """sha256 of the weight file and behind it, where there is one, of its config.

    Raises CheckpointError where there is no weight file, or several.
    """
    weights = find(path)
    if weights.suffix == ".json":
        what, fix = "the weights are in several files", "save them as one"
        raise CheckpointError(what, str(weights), fix)
    config = config_file(weights)
    return "".join(files.digest(file, INSTALL) for file in (weights, config) if file is not None)


def load(path=None):
    """`(module, params)` of the network.

    Args:
        path: a directory with transformers' config.json and weights, or a `.safetensors`, `.bin`,
            `.pth` or `.pt` file of either layout. Without transformers' config.json beside it a
            file has the published sizes.

    Raises:
        CheckpointError: no weights, or a file of another network.
        ConfigError: a config of another network.
    """
    weights = find(path)
    tensors, config = files.read_tensors(weights), config_file(weights)
    if table_of(tensors, str(weights)) is ORIGINAL:  # has no config; the one there is another's
        config = None
    given = None if config is None else files.read_config(config)
    return from_torch(tensors, given, str(weights))


def from_torch(tensors, config=None, where="weights"):
    """`(module, params)` of tensors {key: array} in either layout.

    `config`: transformers' config.json as a dict; the published network unless given.
    """
    table = table_of(tensors, where)
    module, target = shapes(**({} if config is None else fields_of(config, where)))
    return module, rules.to_params(tensors, target, table, where)


def table_of(tensors, where):
    """The `Table` of these tensors' layout. Raises CheckpointError for another network's."""
    for key, table in LAYOUTS.items():
        if key in tensors:
            return table
    raise CheckpointError("no weights of MiDaS's DPT-hybrid", where, INSTALL)


def shapes(**fields):
    """`(module, shapes of its parameters)` without weights; `fields` are `DPTHybrid`'s.

    Raises ConfigError for sizes of which there is no such network.
    """
    module = DPTHybrid(**fields)
    example = jax.ShapeDtypeStruct((1, MULTIPLE, MULTIPLE, 3), "float32")
    try:
        return module, jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    except CnxsError:
        raise
    except Exception as error:  # whatever flax or jax say to impossible sizes
        what = f"no DPT-hybrid of these sizes: {str(error)[:300]}"
        raise ConfigError(what, "config.json", INSTALL) from None


def fields_of(config, where):
    """`DPTHybrid`'s fields of transformers' config.json. Raises ConfigError."""
    try:
        return _fields_of(config, where)
    except ConfigError as error:
        raise ConfigError(error.what, error.where, INSTALL) from None


def _fields_of(config, where):
    backbone = config.get("backbone_config")
    if config.get("model_type") != "dpt" or not isinstance(backbone, dict):
        raise ConfigError("the config beside the weights is none of a DPT-hybrid", where)
    families.check_supported(config, SUPPORTED, where)
    # What transformers takes for keys that are absent is another network's.
    absent = {"layer_type": "preactivation", "global_padding": None}
    families.check_supported({**absent, **backbone}, SUPPORTED_BACKBONE, where)
    given = {name: config.get(name) for name in FIELDS}
    given |= {name: backbone.get(name) for name in BACKBONE_FIELDS}
    try:
        given["hidden_sizes"] = backbone["hidden_sizes"][:3]  # the published one lists a fourth
        given["backbone_out_indices"] = config["backbone_out_indices"][2:]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"no list of sizes: {error}", where) from None
    types = {name: field.type for name, field in DPTHybrid.__dataclass_fields__.items()}
    fields = {
        name: families.check_value(name, value, types[name], where) for name, value in given.items()
    }
    check_sizes(fields, where)
    return fields


def check_sizes(fields, where):
    """Raises ConfigError for sizes that do not fit together."""
    lengths = {"hidden_sizes": 3, "depths": 3, "backbone_out_indices": 2, "neck_hidden_sizes": 4}
    for name, length in lengths.items():
        if len(fields[name]) != length or not all(type(n) is int for n in fields[name]):
            raise ConfigError(f"{name} = {fields[name]}, expected {length} whole numbers", where)
    if max(fields["depths"]) > families.MAX_LAYERS:
        what = f"depths = {fields['depths']}, expected at most {families.MAX_LAYERS}"
        raise ConfigError(what, where)
    for width in fields["hidden_sizes"]:
        if width % (8 * BOTTLENECK):  # transformers rounds to eights
            raise ConfigError(f"hidden_sizes: {width} is no multiple of {8 * BOTTLENECK}", where)
    low, high = fields["backbone_out_indices"]
    if not low < high < fields["num_hidden_layers"]:
        what = f"backbone_out_indices end with {low} and {high}, expected two layers in their order"
        raise ConfigError(what, where)

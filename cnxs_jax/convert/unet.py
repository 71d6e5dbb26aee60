"""Stable Diffusion's UNet: diffusers names, the original (LDM) names, the published configs.

diffusers' names follow from the mechanical rule alone: no layer is stacked, because the
transformers differ in depth (1, 2 and 10 blocks in SDXL). The LDM names of single files number the
stages of the network, so their table is made for a module.
"""

from cnxs_jax.convert.rules import Rule, Table

DIFFUSERS = Table()

# {config key: values that this UNet computes}; the first one is diffusers' default.
SUPPORTED = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}
EXTRAS = {key: values[0] for key, values in SUPPORTED.items()}
# The same of `ControlNetModel`, whose config has fewer keys.
CONTROLNET = {"global_pool_conditions": (False,)} | {
    key: SUPPORTED[key]
    for key in (
        *("flip_sin_to_cos", "freq_shift", "only_cross_attention", "downsample_padding"),
        *("mid_block_scale_factor", "act_fn", "encoder_hid_dim", "encoder_hid_dim_type"),
        *("num_attention_heads", "class_embed_type", "num_class_embeds"),
        "resnet_time_scale_shift",
    )
}

# Configs of the published UNets where they differ from the fields' defaults; v-prediction and
# LCM variants have the same tensors (LCM: and `time_cond_proj_dim` = 256).
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_REFINER = {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": (
        "DownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 1280,
    "attention_head_dim": (6, 12, 24, 24),
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}
PUBLISHED = {
    "sd15": {"cross_attention_dim": 768},
    "sd21": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": _SDXL,
    "sdxl_refiner": _SDXL | _REFINER,
}

LDM_PREFIX = "model.diffusion_model."  # of the UNet in a single file
LDM_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
LDM_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def ldm(module, prefix=""):
    """The table of the original names for a `UNet`.

    Args:
        prefix: before every name; `LDM_PREFIX` in a file that holds the other networks, too.
    """
    blocks = [*_encoder(module), *_middle(), *_decoder(module)]
    pairs = [*LDM_OUTSIDE.items(), *(pair for block in blocks for pair in block)]
    names = [(f"{prefix}{old}.{{p}}", f"{new}.{{p}}") for old, new in pairs if new[-1] != "}"]
    inner = [(f"{prefix}{old}", new) for old, new in pairs if new[-1] == "}"]
    return Table(rules=tuple(Rule(old, (new,)) for old, new in [*names, *inner]))


def resnet_names(old, new):
    return [(f"{old}.{a}", f"{new}.{b}") for a, b in LDM_RESNET.items()]


def transformer_names(old, new):
    return [(f"{old}.{{rest}}", f"{new}.{{rest}}")]  # the same names inside


def _encoder(module):
    layers = module.per_level(module.layers_per_block)
    for n, (i, j) in enumerate(module.down_stages, 1):
        if j == layers[i]:
            yield [(f"input_blocks.{n}.0.op", f"down_blocks.{i}.downsamplers.0.conv")]
            continue
        yield resnet_names(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}")
        if module.down_block_types[i].startswith("CrossAttn"):
            yield transformer_names(f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}")


def _middle():
    yield resnet_names("middle_block.0", "mid_block.resnets.0")
    yield transformer_names("middle_block.1", "mid_block.attentions.0")
    yield resnet_names("middle_block.2", "mid_block.resnets.1")


def _decoder(module):
    for n, (i, j) in enumerate(module.up_stages):
        attended = module.up_block_types[i].startswith("CrossAttn")
        last = n + 1 == module.num_stages or module.up_stages[n + 1][0] > i
        yield resnet_names(f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}")
        if last and i + 1 < module.num_levels:  # before the transformer's rule, which takes all
            old = f"output_blocks.{n}.{1 + attended}.conv"
            yield [(old, f"up_blocks.{i}.upsamplers.0.conv")]
        if attended:
            yield transformer_names(f"output_blocks.{n}.1", f"up_blocks.{i}.attentions.{j}")

"""What `families` says of each module: the smallest arguments of its `init`, and what its
config.json has besides its fields for the PyTorch side."""

import jax.numpy as jnp

from cnxs_jax.convert import unet


def pixart_example(module):
    p = module.patch_size
    cond = {
        "text": jnp.zeros((1, 1, module.caption_channels)),
        "size": jnp.zeros((1, 2)),
        "aspect": jnp.zeros((1, 1)),
    }
    return jnp.zeros((1, p, p, module.in_channels)), jnp.zeros((1,)), cond


def pixart_extras(module):
    return {
        "norm_type": "ada_norm_single",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_embeds_ada_norm": 1000,
    }


def pixart_control_example(module):
    tokens, modulation = jnp.zeros((1, 1, module.features)), jnp.zeros((1, 6, module.features))
    return tokens, {"hint": tokens, "kv": None}, (modulation, tokens, None, None)


def vae_example(module):
    side = 2 ** (len(module.block_out_channels) - 1)
    return (jnp.zeros((1, side, side, module.in_channels)),)


def vae_extras(module):
    n = len(module.block_out_channels)
    return {
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
    }


def t5_example(module):
    return jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)


def t5_extras(module):
    return {
        "model_type": "t5",
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def unet_example(module):
    side, added = 2 ** (len(module.block_out_channels) - 1), {}
    if module.addition_embed_type:
        # Only the sum of their widths is known: one number and a pooled text that fills the rest.
        rest = module.projection_class_embeddings_input_dim - module.addition_time_embed_dim
        added = {"pooled": jnp.zeros((1, rest)), "time_ids": jnp.zeros((1, 1))}
    text = jnp.zeros((1, 1, module.cross_attention_dim))
    cond = {"text": text, "guidance": jnp.zeros((1,)), **added}
    return jnp.zeros((1, side, side, module.in_channels)), jnp.zeros((1,)), cond


def unet_extras(module):
    return unet.EXTRAS


def controlnet_xs_example(module):
    side = 2 ** (len(module.block_out_channels) - 1)
    pixels = side * module.hint_factor
    hint = jnp.zeros((1, pixels, pixels, module.conditioning_channels))
    text = jnp.zeros((1, 1, module.cross_attention_dim))
    return jnp.zeros((1, side, side, module.in_channels)), hint, text


def controlnet_example(module):
    x, t, cond = unet_example(module)
    pixels = x.shape[1] * module.hint_factor
    return x, t, jnp.zeros((1, pixels, pixels, module.conditioning_channels)), cond


def clip_text_example(module):
    return (jnp.zeros((1, 2), jnp.int32),)


def clip_text_extras(module):
    return {"model_type": "clip_text_model", "bos_token_id": 0, "pad_token_id": 1}


def clip_vision_example(module):
    return (jnp.zeros((1, module.image_size, module.image_size, module.num_channels)),)


def clip_vision_extras(module):
    return {"model_type": "clip_vision_model"}


def pixel_unet_example(module):
    # 2 to the number of levels: an efficient stage halves once a level.
    side, low = 2 ** len(module.block_out_channels), {}
    if module.low_res_channels:
        low = {"low_res": jnp.zeros((1, 1, 1, module.low_res_channels))}
    return jnp.zeros((1, side, side, module.in_channels)), jnp.zeros((1,)), low


def style_words_example(module):
    return (jnp.zeros((1, module.projection_dim)),)

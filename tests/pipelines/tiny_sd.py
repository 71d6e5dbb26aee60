"""A random Stable Diffusion of a few thousand parameters, and its tokenizer, for tests."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnxs_jax.control import controlnet_xs
from cnxs_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from cnxs_jax.models.unet import UNet
from cnxs_jax.models.vae import AutoencoderKL
from cnxs_jax.pipelines.base import Component
from cnxs_jax.pipelines.stable_diffusion import StableDiffusionPipeline, StableDiffusionXLPipeline
from tests.pipelines.tiny import perturbed

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIDE = 16  # pixels: 8 x 8 latents
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
UNET = dict(
    sample_size=SIDE // 2,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=16,
    attention_head_dim=2,
)
XL = UNET | dict(
    cross_attention_dim=16 + 24,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=10 + 6 * 6,
)
VAE = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
CLIP = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=77,
)  # fmt: skip
CLIP_2 = CLIP | dict(hidden_size=24, projection_dim=10, hidden_act="gelu")


def write_tokenizer(directory, pad="<|endoftext|>"):
    """The files of a CLIPTokenizer whose tokens are letters; returns the size of its vocabulary."""
    words = [*LETTERS, *(c + "</w>" for c in LETTERS), pad, "<|startoftext|>", "<|endoftext|>"]
    words = list(dict.fromkeys(words))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    config |= {name: "<|endoftext|>" for name in ("unk_token", "eos_token")}
    config |= {"bos_token": "<|startoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return len(words)


@functools.cache
def networks(words, words_2=None, **unet):
    """The components; a further call with the same arguments gives the same arrays."""
    ids = jnp.ones((1, 4), jnp.int32)
    config = {**(UNET if words_2 is None else XL), **unet}
    cond = {"text": jnp.zeros((1, 4, config["cross_attention_dim"])), "guidance": jnp.ones((1,))}
    cond |= {"pooled": jnp.zeros((1, 10)), "time_ids": jnp.ones((1, 6))}
    clip = CLIPTextModel(vocab_size=words, eos_token_id=words - 1, **CLIP)
    made = {
        "unet": (UNet(**config), (jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,)), cond)),
        "vae": (AutoencoderKL(**VAE), (jnp.zeros((1, 16, 16, 3)),)),
        "text_encoder": (clip, (ids,)),
    }
    if words_2 is not None:
        second = CLIPTextModelWithProjection(vocab_size=words_2, eos_token_id=words_2 - 1, **CLIP_2)
        made["text_encoder_2"] = (second, (ids,))
    return {name: Component(net, perturbed(net, *args)) for name, (net, args) in made.items()}


def pipeline(directory, xl=False, **unet):
    """A pipeline with its tokenizers in `directory`."""
    load = StableDiffusionPipeline.load_tokenizer
    words = write_tokenizer(directory / "tokenizer")
    first = load(directory / "tokenizer")
    if not xl:
        return StableDiffusionPipeline(networks(words, **unet), first, SCHEDULER)
    words_2 = write_tokenizer(directory / "tokenizer_2", pad="!")
    second = load(directory / "tokenizer_2")
    return StableDiffusionXLPipeline(networks(words, words_2, **unet), (first, second), SCHEDULER)


def xs_on(module, **fields):
    """(module, params) of a ControlNet-XS on a UNet."""
    fields = {"conditioning_embedding_out_channels": (4, 6), "num_attention_heads": 2} | fields
    adapter = controlnet_xs.from_unet(module, block_out_channels=(4, 6), **fields)
    text = jnp.zeros((1, 1, adapter.cross_attention_dim))
    args = jnp.zeros((1, SIDE // 2, SIDE // 2, 4)), jnp.zeros((1, SIDE, SIDE, 3)), text
    return adapter, perturbed(adapter, *args)


class Adapter(nn.Module):
    """A controller as small as can be: adds the hint's colours to the base's output."""

    hint_factor = 2

    @nn.compact
    def __call__(self, hint, scale):
        return nn.Conv(4, (2, 2), (2, 2), name="conv")(hint) * scale[:, None, None, None]

    @staticmethod
    def wrap(base, adapters, compat="official"):
        several = isinstance(adapters, tuple)
        return Controlled(base, Adapters(adapters) if several else adapters)


class Adapters(nn.Module):
    """Several of them."""

    adapters: tuple

    def __call__(self, hints, scales):
        rows = zip(self.adapters, hints, scales, strict=True)
        return sum(adapter(hint, scale) for adapter, hint, scale in rows)


class Controlled(nn.Module):
    """The base with one `Adapter` or several."""

    base: nn.Module
    control: nn.Module

    def __call__(self, x, t, cond):
        return self.base(x, t, cond) + self.control(cond["hint"], cond["control_scale"])

    def prepare(self, cond):
        return self.base.prepare(cond)


def adapter(seed=0):
    """`(module, params)` of an `Adapter`."""
    module = Adapter()
    return module, perturbed(module, jnp.zeros((1, SIDE, SIDE, 3)), jnp.ones((1,)), seed=seed)


def ramp(height=SIDE, width=SIDE):
    """A picture float32 [H,W,3] that no flip or crop leaves as it is."""
    rows, columns = jnp.linspace(0, 1, height), jnp.linspace(0, 1, width)
    grid = jnp.meshgrid(rows, columns, indexing="ij")
    return jax.device_get(jnp.stack([*grid, grid[0] * grid[1]], axis=-1)).astype("float32")

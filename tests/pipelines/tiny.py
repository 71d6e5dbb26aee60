"""A random PixArt pipeline of a few thousand parameters, for tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import tree
from cnxs_jax.control.controlnet_transformer import ControlNetTransformer
from cnxs_jax.data import text
from cnxs_jax.models.dit import PixArt
from cnxs_jax.models.t5 import T5Encoder
from cnxs_jax.models.vae import AutoencoderKL
from cnxs_jax.pipelines.base import Component
from cnxs_jax.pipelines.pixart import PixArtAlphaPipeline

SIDE = 16  # pixels: 8 x 8 latents, 4 x 4 tokens
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


@functools.cache
def tokenizer(directory):
    """The tokenizer of three captions, written to `directory`."""
    text.save_tokenizer(text.train_tokenizer(["a red fox", "two blue cats", "a boat"]), directory)
    return text.load_tokenizer(directory)


def perturbed(module, *args, seed=0, **kwargs):
    """Random parameters without zeros, so that no path is dead. Nothing is computed but shapes."""
    shapes = jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), *args)
    return jax.tree.map(jnp.asarray, filled(shapes["params"], seed))


def filled(shapes, seed=0):
    """Random float32 numpy arrays of the shapes of a parameter tree."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        fan_in = np.prod(leaf.shape[-2:-1] if len(leaf.shape) < 4 else leaf.shape[:-1])
        centre = 1.0 if path.endswith("scale") else 0.0
        value = centre + rng.standard_normal(leaf.shape) / np.sqrt(max(fan_in, 4))
        return value.astype(np.float32)

    return tree.map_with_path(draw, shapes)


@functools.cache
def networks(vocab_size, **dit):
    """The three components; a further call with the same arguments gives the same arrays."""
    transformer = PixArt(
        num_layers=2, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        caption_channels=16, sample_size=SIDE // 2, **dit,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    t5 = T5Encoder(vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ids = jnp.ones((1, 4), jnp.int32)
    cond = {"text": jnp.zeros((1, 4, 16)), "text_mask": jnp.ones((1, 4), jnp.int32)}
    cond |= {"size": jnp.ones((1, 2)), "aspect": jnp.ones((1, 1))}
    made = {
        "transformer": (transformer, (jnp.zeros((1, 8, 8, 4)), jnp.zeros((1,)), cond)),
        "vae": (vae, (jnp.zeros((1, 16, 16, 3)),)),
        "text_encoder": (t5, (ids, ids)),
    }
    return {name: Component(net, perturbed(net, *args)) for name, (net, args) in made.items()}


def pipeline(directory, null_text=None, use_additional_conditions=False):
    """A pipeline with its tokenizer in `directory`."""
    tokens = tokenizer(directory)
    made = networks(len(tokens), use_additional_conditions=use_additional_conditions)
    return PixArtAlphaPipeline(made, tokens, SCHEDULER, null_text)


def controller():
    """`(module, params)` of a random ControlNet-Transformer for `pipeline`, one block copied."""
    module = ControlNetTransformer(num_layers=1, num_attention_heads=2, attention_head_dim=12)
    tokens, modulation = np.zeros((1, 1, 24), "f4"), np.zeros((1, 6, 24), "f4")
    args = tokens, {"hint": tokens, "kv": None}, (modulation, tokens, None, None)
    return module, perturbed(module, *args)

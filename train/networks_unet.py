"""The networks of a Stable Diffusion pipeline as a task uses them: with weights or as mere shapes.

Texts and conditions are those of `cnxs_jax.pipelines.stable_diffusion`: all tokens are attended to,
SDXL reads two encoders' penultimate layers, a pooled text and the picture's size.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.convert import families, single_file
from cnxs_jax.data import text
from cnxs_jax.errors import ConfigError, did_you_mean
from train import validate

TEXTS = ("text_encoder", "text_encoder_2")
INDEX = "model_index.json"
ZEROS = "force_zeros_for_empty_prompt"  # SDXL's unconditional text is zeros
# Published pipelines -> the kinds of `single_file.LAYOUTS`.
PUBLISHED = {
    "stable-diffusion-v1-5": "sd15",
    "stable-diffusion-2-1-base": "sd21",
    "stable-diffusion-xl-base-1.0": "sdxl",
}


class Networks(NamedTuple):
    """Modules and parameters.

    Attributes:
        texts: (module, params) of one text encoder or of SDXL's two.
        zero_null: whether the unconditional text is zeros instead of the empty prompt's.
    """

    unet: Any
    unet_params: Any
    vae: Any
    vae_params: Any
    texts: tuple
    zero_null: bool = False

    @property
    def encoders(self):
        """What is frozen and makes batches, under the pipeline's names."""
        texts = {name: params for name, (_, params) in zip(TEXTS, self.texts, strict=False)}
        return {"vae": self.vae_params, **texts}

    @property
    def bare(self):
        """The same without parameters, for functions that get those as an argument."""
        texts = tuple((module, None) for module, _ in self.texts)
        return self._replace(unet_params=None, vae_params=None, texts=texts)


def key_of(config):
    """The config's key of the pipeline: of a teacher that is distilled, or of a controlled base."""
    return "config.teacher_path" if config.get("teacher_path") else "config.base_path"


def load(config, path):
    """The networks of the pipeline directory `path`.

    Raises:
        ConfigError: no pipeline there.
        CheckpointError: missing or damaged files.
    """
    from cnxs_jax.pipelines.load import read_model

    root = pathlib.Path(path)
    if not (root / INDEX).is_file():
        fix = "give a diffusers directory, or train one: configs/sd.py"
        raise ConfigError(f"no pipeline at {path!r}", key_of(config), fix)
    dtype = jnp.dtype(config.get("dtype") or "float32")
    # float32 parameters whatever the network computes in: ControlNet starts as their copy
    unet, unet_params = read_model(root / "unet")
    texts = tuple(read_model(root / n, dtype=dtype) for n in TEXTS if (root / n).is_dir())
    zero_null = json.loads((root / INDEX).read_text()).get(ZEROS, len(texts) > 1)
    unet = unet.clone(dtype=dtype, remat=config.get("remat"))
    return Networks(unet, unet_params, *read_model(root / "vae"), texts, zero_null=zero_null)


def zeros(config, path):
    """`Networks` of zeros: inside of `jax.eval_shape`, shapes without memory.

    `path` is a directory or the name of a published pipeline. Raises ConfigError for others.
    """
    dtype = jnp.dtype(config.get("dtype") or "float32")
    found = modules(path, key_of(config))

    def filled(name, of=jnp.float32):
        module, shapes = found[name]
        return module, jax.tree.map(lambda s: jnp.zeros(s.shape, of), shapes)

    unet, unet_params = filled("unet")
    unet = unet.clone(dtype=dtype, remat=config.get("remat"))
    texts = tuple(filled(name, dtype) for name in TEXTS if name in found)
    return Networks(unet, unet_params, *filled("vae"), texts, zero_null=len(texts) > 1)


def modules(path, where="path"):
    """`{component: (module, shapes)}` of a pipeline's directory, or of a published one by name.

    `where` is named in errors.
    """
    from cnxs_jax.pipelines.load import abstract_model

    root = pathlib.Path(path)
    if root.is_dir():
        names = [n for n in ("unet", "vae", *TEXTS) if (root / n).is_dir()]
        return {name: abstract_model(root / name) for name in names}
    if root.name not in PUBLISHED:
        hint = did_you_mean(root.name, PUBLISHED)
        fix = f"give a diffusers directory, or one of {', '.join(PUBLISHED)}"
        what = f"no pipeline at {path!r}, and none is published so.{hint}"
        raise ConfigError(what, where, fix)
    kind, found = PUBLISHED[root.name], {}
    for name in single_file.LAYOUTS[kind]:
        family = families.family_of({"_class_name": single_file.CLASSES[name]}, name)
        found[name] = families.build(family, single_file.published(kind, name), name)
    return found


def tokenizing(tokenizers):
    """`tokenize` for `train.inputs`: ids [B,L], of several tokenizers [B,N,L], and a mask [B,L]."""

    def tokenize(_, captions, length):
        found = [text.tokenize(each, captions, length) for each in tokenizers]
        ids = [ids for ids, _ in found]
        return ids[0] if len(ids) == 1 else np.stack(ids, axis=1), found[0][1]

    return tokenize


def max_tokens(tokenizer, encoder):
    """Tokens a text is padded or cut to, as the pipeline does it."""
    return min(tokenizer.model_max_length, encoder.max_position_embeddings)


def check_fit(unet, vae, width, size):
    """Raises ConfigError unless UNet, VAE and texts of this width fit each other and `size` px."""
    where = "config.unet"
    for name in ("in_channels", "out_channels"):
        given = getattr(unet, name)
        if given != vae.latent_channels:
            raise ConfigError(f"{name} {given}, the VAE has {vae.latent_channels}", where)
    if unet.cross_attention_dim != width:
        what = f"cross_attention_dim {unet.cross_attention_dim}, the text encoder gives {width}"
        raise ConfigError(what, where)
    if size % vae.downsample_factor:
        raise ConfigError(
            f"{size} px are not a multiple of the VAE's {vae.downsample_factor}",
            "config.data.size",
            f"the nearest are {validate.nearest(size, vae.downsample_factor)}",
        )


def embed(nets, encoders, tokens):
    """`text` [B,L,D] and SDXL's `pooled` [B,P] of `input_ids`: [B,L], or [B,N,L] for N encoders."""
    ids, outs = tokens["input_ids"], []
    for i, (name, (module, _)) in enumerate(zip(TEXTS, nets.texts, strict=False)):
        own = ids[:, i] if ids.ndim == 3 else ids
        outs.append(module.apply({"params": encoders[name]}, own))
    if len(outs) == 1:
        return {"text": outs[0]["last"]}
    both = [out["penultimate"] for out in outs]
    return {"text": jnp.concatenate(both, axis=-1), "pooled": outs[1]["pooled"]}


def unconditional(nets, encoders, given, empty):
    """What takes the place of the texts `given` [B, ...] without a caption; one row or B.

    Args:
        empty: with `input_ids` of the empty prompt.
    """
    if nets.zero_null:
        return jax.tree.map(jnp.zeros_like, given)
    return embed(nets, encoders, empty)


def micro(nets, raw):
    """SDXL's `time_ids` [B,6] of a raw batch, from which nothing is cropped; else nothing."""
    if not nets.unet.addition_embed_type:
        return {}
    batch, height, width = raw["image"].shape[:3]
    sizes = jnp.array([[height, width, 0, 0, height, width]], jnp.float32)
    return {"time_ids": jnp.repeat(sizes, batch, axis=0)}


def condition(nets, encoders, raw, empty, rate, key):
    """The UNet's conditions of a raw batch, with a share `rate` of the captions dropped."""
    given = embed(nets, encoders, raw)
    null = unconditional(nets, encoders, given, empty)
    drop = jax.random.bernoulli(key, rate, (raw["image"].shape[0],))

    def pick(value, other):
        return jnp.where(drop.reshape(-1, *(1,) * (value.ndim - 1)), other, value)

    cond = {name: pick(value, null[name]) for name, value in given.items()}
    return {**cond, **micro(nets, raw)}


def guided_condition(nets, encoders, raw, empty):
    """The conditions of a raw batch with `null` beside them, for a guided teacher."""
    given = embed(nets, encoders, raw)
    null = unconditional(nets, encoders, given, empty)
    null = {name: jnp.broadcast_to(null[name], value.shape) for name, value in given.items()}
    return {**given, **micro(nets, raw), "null": null}

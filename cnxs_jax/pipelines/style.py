"""A reference picture's style for a pipeline of text alone: CLIP's picture as words of the prompt.

`load_pipeline(path, style=DIRECTORY)` takes what `python -m train --config=configs/pixart_style.py`
writes:

    clip_image_encoder/     CLIP's picture encoder, as transformers has it
    style_words/            `models.style_words.StyleWords`: config.json and safetensors

The words stand behind the prompt's own, before its end token. A cascade has its own way
(`pipelines.ediffi`); what both check of a call is here.
"""

import dataclasses
import os
import pathlib

import jax.numpy as jnp
import numpy as np

from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.models.conditioning import clip_pixels
from cnxs_jax.pipelines import images as pictures
from cnxs_jax.pipelines import offload as offloading
from cnxs_jax.pipelines import programs
from cnxs_jax.pipelines import request as requests
from cnxs_jax.pipelines.interface import Component
from cnxs_jax.pipelines.load import place, read_model

IMAGE_ENCODER, WORDS = "clip_image_encoder", "style_words"


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a call gives: one picture a prompt, and its own guidance weight or None."""

    pictures: list
    scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Style:
    """What turns reference pictures into pseudo-words.

    Attributes:
        image_encoder: CLIP's, a `Component`.
        words: a `Component` of `StyleWords`.
    """

    image_encoder: Component
    words: Component

    @property
    def count(self):
        """Pseudo-words a picture."""
        return self.words.module.num_words

    def embeddings(self, given, run):
        """CLIP's embeddings [N,P] of a list of pictures; `run` is the pipeline's."""
        pixels = clip_input(given, self.image_encoder.module.image_size)
        return run(self.image_encoder, programs.apply, pixels)

    def read(self, given, run):
        """Pseudo-words [N,n,D] of a list of pictures."""
        return run(self.words, programs.apply, self.embeddings(given, run))


def open_style(given, mesh=None, offload=None):
    """The `Style` of a directory, a `Style` as it is, None for None or an empty list.

    In float32: it is small, and runs once a picture.

    Raises:
        ConfigError: something else. CheckpointError: missing, damaged or ill-fitting files.
    """
    if given is None or isinstance(given, Style):
        return given
    if isinstance(given, list | tuple) and not given:
        return None
    if not isinstance(given, str | os.PathLike):
        what = f"expected a directory, got {type(given).__name__}"
        raise ConfigError(what, "style", "what configs/pixart_style.py trains")
    root, found = pathlib.Path(given), {}
    fix = "give the export of a run of configs/pixart_style.py"
    if not root.is_dir():
        raise CheckpointError("there is no such directory", str(root), fix)
    for name in (IMAGE_ENCODER, WORDS):
        if not (root / name).is_dir():
            raise CheckpointError(f"there is no directory {name} in it", str(root), fix)
        if offload is not None:
            found[name] = Component(*offloading.load(root / name, offload))
        else:
            module, params = read_model(root / name)
            found[name] = Component(module, place(params, mesh))
    style = Style(found[IMAGE_ENCODER], found[WORDS])
    kinds = [type(style.image_encoder.module).__name__, type(style.words.module).__name__]
    if kinds != ["CLIPVisionModelWithProjection", "StyleWords"]:
        raise CheckpointError("they hold {} and {}".format(*kinds), str(root))
    widths = [m.projection_dim for m in (style.image_encoder.module, style.words.module)]
    if widths[0] != widths[1]:
        what = "pictures have {} channels, {} are read".format(*widths)
        raise CheckpointError(what, str(root))
    return style


def check(style, text_encoder, length):
    """Raises ConfigError where the words do not fit the encoder `module`, or texts of `length`."""
    if style.words.module.d_model != text_encoder.d_model:
        widths = style.words.module.d_model, text_encoder.d_model
        what = "words of {} channels for a text encoder of {}".format(*widths)
        raise ConfigError(what, "style", "train it with this pipeline's text encoder")
    if style.count > length - 2:
        what = f"{style.count} words in texts of {length} tokens"
        raise ConfigError(what, "style", "train fewer, --config.words.num_words")


def reference(style_image, style_scale, request):
    """The `Reference` of a call's arguments, None without a picture. Raises ConfigError."""
    scale = check_scale(style_scale, style_image is not None and request.guided)
    if style_image is None:
        return None
    return Reference(one_a_prompt(style_image, len(request.prompts)), scale)


def one_a_prompt(style_image, count):
    """A list of `count` pictures, uint8 or float [H,W,3] as `to_array` makes it."""
    several = isinstance(style_image, list | tuple)
    given = list(style_image) if several else [style_image] * count
    if len(given) != count:
        raise ConfigError(f"{len(given)} pictures for {count} prompts", "style_image")
    try:
        return [pictures.to_array(picture) for picture in given]
    except ConfigError as error:
        raise ConfigError(error.what, "style_image", error.fix) from None


def clip_input(given, size):
    """CLIP's input [N,size,size,3] of arrays as `one_a_prompt` gives them."""
    return jnp.concatenate([clip_pixels(jnp.asarray(one)[None], size) for one in given])


def check_scale(style_scale, usable):
    """The weight or None; ConfigError for what is no number, or would weigh nothing."""
    if style_scale is None:
        return None
    scale = requests.guidance_scale(style_scale, "style_scale")
    if not usable:
        raise ConfigError("it needs a style_image and guidance_scale > 1", "style_scale")
    return scale


def insert(ids_BxL, mask_BxL, words, length):
    """Ids and mask [B,length] with the ids `words` [n] before each text's end token, numpy.

    The texts leave room for them: L + n is at most `length`.
    """
    ids, mask = (np.pad(a, ((0, 0), (0, length - a.shape[1]))) for a in (ids_BxL, mask_BxL))
    for row, there in zip(ids, mask, strict=True):
        start = int(there.sum()) - 1
        row[start : start + len(words) + 1] = [*words, row[start]]
        there[: start + len(words) + 1] = 1
    return ids, mask


def counted(painted, count):
    """Painted words' `cond` of L tokens as one of L + count: pseudo-words count, unpainted."""
    tokens, mask = painted["word_tokens"], painted["word_mask"]
    own, places = tokens.sum(1, keepdims=True), np.arange(tokens.shape[1] + count)[None]
    tokens = np.pad(tokens, ((0, 0), (0, count))) | ((places >= own) & (places < own + count))
    mask = np.pad(mask, ((0, 0), (0, 0), (0, 0), (0, count)))
    return {**painted, "word_tokens": tokens, "word_mask": mask}

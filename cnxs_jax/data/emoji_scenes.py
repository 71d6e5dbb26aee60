"""Emoji scenes, the embedded world: real sprites, procedural composition, exact truth.

32 concepts in 4 styles on 6 backgrounds; 16 (concept, style) pairs and a tenth of the relation
triples are held out of training, so that composition can be told from memory. The sprites are
`assets/emoji_sprites.npz` (made by `build_sprites.py`; licences in LICENSE-DATA).
"""

import functools
import io
import json
import pathlib

import numpy as np
from PIL import Image

from cnxs_jax import errors
from cnxs_jax.data import scenes
from cnxs_jax.data.scenes import RELATIONS, SPLITS

__all__ = ["BACKGROUNDS", "RELATIONS", "SPLITS", "STYLES", "make_scene", "world"]

SPRITES = pathlib.Path(__file__).parent.parent / "assets" / "emoji_sprites.npz"
NUM_CONCEPTS = 32
STYLES = ("cartoon", "flat", "3d", "sticker")
BACKGROUNDS = {
    "white": (248, 248, 248),
    "blue": (138, 190, 246),
    "green": (160, 216, 140),
    "yellow": (252, 226, 120),
    "pink": (250, 176, 204),
    "gray": (150, 152, 158),
}


@functools.cache
def sprite_images():
    """All sprites, `{(concept, style): PIL RGBA}`, longer side 64 px, in the file's order."""
    if not SPRITES.is_file():
        fix = "reinstall, or run python -m cnxs_jax.data.build_sprites"
        raise errors.DataError("sprite file missing", SPRITES, fix)
    with np.load(SPRITES, allow_pickle=False) as data:
        blob, offsets = data["webp"].tobytes(), data["offsets"]
        index = json.loads(data["index"].tobytes())
    spans = zip(offsets[:-1], offsets[1:], strict=True)
    files = [Image.open(io.BytesIO(blob[a:b])).convert("RGBA") for a, b in spans]
    return {(e["concept"], e["style"]): f for e, f in zip(index, files, strict=True)}


def render(concept, style, extent):
    """The sprite at `extent` px (longer side): uint8 [h, w, 4], alpha-premultiplied."""
    image = sprite_images()[concept, style]
    scale = extent / max(image.size)
    shape = tuple(max(1, round(scale * side)) for side in image.size)
    rgba = np.asarray(image.convert("RGBa").resize(shape, Image.LANCZOS))
    return np.minimum(rgba, rgba[..., 3:])  # Lanczos rings; a colour cannot exceed its alpha


@functools.cache
def world(num_concepts=NUM_CONCEPTS):
    """The `scenes.World` of the first `num_concepts` concepts (at most 40)."""
    concepts = tuple(dict.fromkeys(c for c, _ in sprite_images()))
    if not 3 <= num_concepts <= len(concepts):
        fix = f"use 3 to {len(concepts)}"
        raise errors.ConfigError(f"{num_concepts} concepts", "num_concepts", fix)
    return scenes.World("emoji_scenes", concepts[:num_concepts], STYLES, BACKGROUNDS, render)


def make_scene(rng, spec=None, *, size=64, split="train", truth=True, num_concepts=NUM_CONCEPTS):
    """One emoji scene; `rng` is an int seed or a numpy Generator. See `scenes.make_scene`."""
    return scenes.make_scene(world(num_concepts), rng, spec, size=size, split=split, truth=truth)


def __getattr__(name):
    if name == "CONCEPTS":
        return world().concepts
    if name == "EmojiScenes":  # tensorflow_datasets is imported only when it is asked for
        from cnxs_jax.data.tfds_builder import EmojiScenes

        return EmojiScenes
    raise AttributeError(name)

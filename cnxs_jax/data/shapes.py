"""Procedural shapes: the tests' world. Same compositor and example format as emoji scenes, no
files, 32 px, a few words ("a red circle", filled or outlined)."""

import functools
import itertools

import numpy as np
from PIL import Image, ImageDraw

from cnxs_jax.data import scenes

COLORS = {"red": (214, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 210), "black": (25,) * 3}
# Corners in the unit square; None is the circle.
SHAPES = {
    "circle": None,
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "cross": [(a / 3, b / 3) for a, b in
              [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2),
               (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]],
}  # fmt: skip
STYLES = ("filled", "outlined")
BACKGROUNDS = {"white": (245, 245, 245), "yellow": (250, 220, 110), "pink": (250, 180, 205)}
OVERSAMPLE = 8


def render(concept, style, extent):
    """uint8 [extent, extent, 4], premultiplied; anti-aliased by drawing 8 times larger."""
    color, shape = concept.split()
    side = OVERSAMPLE * extent
    fill = COLORS[color] + (255,)
    pale = tuple(255 - (255 - c) // 5 for c in COLORS[color]) + (255,)
    image = Image.new("RGBA", (side, side))
    _draw(image, shape, fill, 0)
    if style == "outlined":
        _draw(image, shape, pale, 0.14 * side)
    return np.asarray(image.convert("RGBa").resize((extent, extent), Image.BOX))


def _draw(image, shape, color, margin):
    span, draw = image.width - 1 - 2 * margin, ImageDraw.Draw(image)
    if SHAPES[shape] is None:
        draw.ellipse([margin, margin, margin + span, margin + span], fill=color)
        return
    if shape == "cross":  # keep the border equally wide on the thin arms
        margin, span = (margin / 2, image.width - 1 - margin) if margin else (margin, span)
    draw.polygon([(margin + span * x, margin + span * y) for x, y in SHAPES[shape]], fill=color)


@functools.cache
def world():
    """The `scenes.World` of 16 coloured shapes in 2 styles on 3 backgrounds."""
    concepts = tuple(f"{c} {s}" for s, c in itertools.product(SHAPES, COLORS))
    return scenes.World("shapes", concepts, STYLES, BACKGROUNDS, render)


def make_scene(rng, spec=None, *, size=32, split="train", truth=True):
    """One scene of shapes; see `scenes.make_scene`."""
    return scenes.make_scene(world(), rng, spec, size=size, split=split, truth=truth)

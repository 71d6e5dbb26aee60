"""What the page may send: its limits, and how it becomes arguments. Nothing of it is trusted."""

import base64
import binascii
import dataclasses
import io
import re
import struct
from typing import Any

import numpy as np

from cnxs_jax.control import hints
from cnxs_jax.control.paint import colour_masks
from cnxs_jax.convert import hed
from cnxs_jax.data import pixels
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines.request import MAX_PROMPT

MAX_STEPS = 50
MAX_GUIDANCE = 20.0
STRENGTH, MAX_STRENGTH = 1.3, 20.0  # of painted words, times the recommended weight
MAX_CONTROL_SCALE = 2.0
MAX_STYLE_SCALE = 20.0
MAX_BYTES = 4 * 2**20  # of a picture's file
MAX_PIXELS = 2**22
PAINTING_SIDE = 512  # a painting is made smaller before it is taken apart
FORMATS = ("PNG", "JPEG", "WEBP")
DATA_URL = re.compile(r"data:image/(?:png|jpeg|webp);base64,")
# What is painted with: far apart, so that blended edges are none of them.
COLOURS = {"#e6194b": "red", "#3cb44b": "green", "#4363d8": "blue", "#ffe119": "yellow"}
AS_IT_IS = "as it is"
HINTS = (AS_IT_IS, "canny", *(("hed",) if hed.packaged() else ()))  # those that pictures have


@dataclasses.dataclass(frozen=True)
class Form:
    """The fields of the page as they come in.

    Attributes:
        size: one of the sizes that are offered.
        steps, guidance: of the teacher. student_steps: of the student, where there is one.
        painting: None or {"picture": data URL, "phrases": {colour: phrase}}; strength: its factor.
        control, style: None or {"picture": data URL}.
        hint: what becomes of the control picture, one of `HINTS`.
        style_scale: guidance weight of the style picture; 0 is the text's own.
    """

    prompt: Any
    size: Any
    negative_prompt: Any = ""
    steps: Any = 20
    guidance: Any = 0.0
    student_steps: Any = 4
    seed: Any = 0
    painting: Any = None
    strength: Any = STRENGTH
    control: Any = None
    hint: Any = AS_IT_IS
    control_scale: Any = 1.0
    style: Any = None
    style_scale: Any = 0.0


def text(value, name):
    """A text that the networks and files can take, without white space around it; None is ""."""
    value = "" if value is None else value
    if not isinstance(value, str):
        raise ConfigError(f"expected a text, got {type(value).__name__}", name)
    if len(value) > MAX_PROMPT:  # before anything reads it
        what = f"{len(value)} characters, at most {MAX_PROMPT}"
        raise ConfigError(what, name, "shorten it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("half a character, which is no text", name) from None
    return value.strip()


def whole(value, name, low, high):
    """A whole number from `low` to `high`; pages send 20.0, too."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"expected a whole number, got {type(value).__name__}", name)
    if not low <= value <= high:
        raise ConfigError(f"expected {low} to {high}", name)
    return value


def number(value, name, high):
    """A number from 0 to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"expected a number, got {type(value).__name__}", name)
    if not 0 <= value <= high:  # NaN is not, either
        raise ConfigError(f"expected 0 to {high:g}", name)
    return float(value)


def choice(value, choices, name):
    """One of the texts that are offered."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError("that is not offered", name, f"one of {', '.join(choices)}")
    return value


def picture(field, name):
    """The RGB picture of a field {"picture": data URL}, upright and without metadata, or None.

    Size in bytes and pixels is looked at before anything is decoded.
    """
    from PIL import Image

    if field is not None and not isinstance(field, dict):
        raise ConfigError(f"expected a picture, got {type(field).__name__}", name)
    url = (field or {}).get("picture")
    if url is None:
        return None
    data = _bytes(url, name)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                what = f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} in all"
                raise ConfigError(what, name, "make the picture smaller")
            return _plain(image, name)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError):
        fix = f"give a {', '.join(FORMATS)} of at most {MAX_PIXELS} pixels"
        raise ConfigError("not a readable picture", name, fix) from None


def _bytes(url, name):
    if not isinstance(url, str):
        raise ConfigError(f"expected a picture, got {type(url).__name__}", name)
    start = DATA_URL.match(url)
    if start is None:  # an address is never fetched
        raise ConfigError("expected the data of a PNG, JPEG or WebP", name)
    if len(url) - start.end() > 4 * (MAX_BYTES // 3):
        raise ConfigError(f"more than {MAX_BYTES} bytes", name, "make the picture smaller")
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError("the data is not base64", name) from None


def _plain(image, name):
    """RGB as `pixels.rgb` makes it, turned as its camera was held, nothing but pixels."""
    from PIL import Image, ImageOps

    return Image.fromarray(np.asarray(pixels.rgb(ImageOps.exif_transpose(image), name)))


def word_masks(painting, strength):
    """{phrase: (mask float32 [h,w], strength)} of a painting, or None where nothing is painted.

    Raises:
        ConfigError: a colour without a phrase, a phrase without its colour.
    """
    image = picture(painting, "painting")
    strength = number(strength, "strength", MAX_STRENGTH)
    phrases = (painting or {}).get("phrases") or {}
    if not isinstance(phrases, dict) or not set(phrases) <= set(COLOURS):
        raise ConfigError(f"phrases of the colours {', '.join(COLOURS)} only", "painting")
    phrases = {colour: text(phrase, "painting") for colour, phrase in phrases.items()}
    masks = {}
    for colour, mask in _painted(image).items():
        phrase, called = phrases.get(colour), COLOURS[colour]
        if phrase and mask is None:
            fix = f"paint with {called}, or empty the field"
            raise ConfigError(f"{phrase!r} is painted nowhere", "painting", fix)
        if mask is not None and not phrase:
            fix = "write a phrase of the prompt beside the colour"
            raise ConfigError(f"nothing says what {called} stands for", "painting", fix)
        if phrase:
            masks[phrase] = np.maximum(masks.get(phrase, 0), mask.astype(np.float32))
    return {phrase: (mask, strength) for phrase, mask in masks.items()} or None


def _painted(image):
    """{colour: bool [h,w], or None where it does not occur}."""
    from PIL import Image

    if image is None:
        return dict.fromkeys(COLOURS)
    image.thumbnail((PAINTING_SIDE, PAINTING_SIDE), Image.Resampling.NEAREST)
    pixels, found = np.asarray(image), {}
    for colour in COLOURS:
        try:
            found[colour] = colour_masks(pixels, {colour: colour})[colour]
        except ConfigError:  # it does not occur
            found[colour] = None
    return found


def hint(image, kind, size):
    """The control picture that the controller is shown, `size` = (H, W)."""
    from PIL import Image

    image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    if choice(kind, HINTS, "hint") == AS_IT_IS:
        return image
    drawn = hints.named(kind).draw(np.asarray(image)[None])[0]
    return Image.fromarray((drawn * 255).astype(np.uint8))

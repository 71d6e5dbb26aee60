"""Pictures in and out: arrays to PIL, PNG files that know how they were made, grids."""

import io
import json

import numpy as np

from cnxs_jax.data import pixels
from cnxs_jax.errors import ConfigError, DataError, NumericsError
from cnxs_jax.storage import replacing

# Private-use chunk keyword under which the parameters are stored, as JSON.
PNG_KEY = "cnxs_jax"
LABEL_HEIGHT = 14


def to_pil(images):
    """PIL pictures from float [B,H,W,3] in [0,1], rounded to the nearest of 256 levels."""
    from PIL import Image

    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ConfigError(f"expected images [B,H,W,3], got shape {images.shape}", "images")
    return [Image.fromarray(levels) for levels in to_uint8(images)]


def to_uint8(x):
    """float [0, 1] to the nearest of 256 levels, uint8 of the same shape.

    Raises:
        NumericsError: NaN or infinity, which a clamp would make black or white.
    """
    x = np.asarray(x, np.float32)
    bad = int(x.size - np.isfinite(x).sum())
    if bad:
        fix = "load with dtype='float32'; in training lower optimizer.learning_rate and --resume"
        raise NumericsError(f"{bad} of {x.size} values are NaN or infinity", "pictures", fix)
    return np.round(np.clip(x, 0.0, 1.0) * 255.0).astype(np.uint8)


def to_array(image):
    """float32 [H,W,3] in [0,1] of a PIL picture, or of an array: uint8, or float in [0,1]."""
    if hasattr(image, "convert"):
        image = pixels.rgb(image)
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ConfigError(f"expected one RGB image [H,W,3], got shape {image.shape}", "images")
    if image.dtype == np.uint8:
        return image.astype(np.float32) / 255.0
    if not np.issubdtype(image.dtype, np.floating):
        raise ConfigError(f"expected uint8 or float pixels, got {image.dtype}", "images")
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ConfigError("float pixels must lie in [0,1]", "images", "divide 0..255 by 255")
    return image.astype(np.float32)


def save_png(image, path, parameters=None):
    """Writes a PIL picture or one array as PNG, whole or not at all.

    Args:
        image: PIL picture, or one RGB array (`to_array`).
        path: file name; its directory is created.
        parameters: JSON-able dict stored in a text chunk; `read_parameters` gets it back.
    """
    data = png_bytes(image, parameters)
    with replacing(path) as part:
        part.write_bytes(data)


def png_bytes(image, parameters=None):
    """The file that `save_png` writes, as bytes."""
    from PIL.PngImagePlugin import PngInfo

    if not hasattr(image, "save"):
        image = to_pil(to_array(image)[None])[0]
    info = PngInfo()
    if parameters is not None:
        info.add_itxt(PNG_KEY, json.dumps(parameters, ensure_ascii=False))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def read_parameters(path):
    """The dict that `save_png` stored, or None for a PNG without one.

    Raises:
        DataError: no PNG file, or a chunk that is not JSON.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # the chunk may come after the pixels
            text = image.text.get(PNG_KEY)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"not a readable PNG: {error}", str(path)) from None
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise DataError(f"the stored parameters are not JSON: {error}", str(path)) from None


def make_grid(images, rows, cols, labels=None, gap=2):
    """One PIL picture of `rows` x `cols` equally large pictures, filled row by row.

    Args:
        images: at most rows * cols PIL pictures or RGB arrays; missing cells stay white.
        rows, cols: size of the grid in pictures.
        labels: one text a picture, drawn above it; a row whose texts are all empty has no strip.
        gap: pixels between the pictures.
    """
    from PIL import Image, ImageDraw

    pictures = [i if hasattr(i, "paste") else to_pil(to_array(i)[None])[0] for i in images]
    labels = list(labels) if labels is not None else [""] * len(pictures)
    _check_grid(pictures, rows, cols, labels)
    width, height = pictures[0].size
    strips = [LABEL_HEIGHT if any(labels[r * cols : (r + 1) * cols]) else 0 for r in range(rows)]
    tops = [r * (height + gap) + sum(strips[:r]) for r in range(rows)]
    size = (cols * (width + gap) - gap, rows * (height + gap) - gap + sum(strips))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for n, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        row, col = divmod(n, cols)
        left, top = col * (width + gap), tops[row]
        if label:
            draw.text((left + 1, top + 1), _fit(draw, str(label), width), fill="black")
        grid.paste(picture, (left, top + strips[row]))
    return grid


def _fit(draw, text, width):
    """`text`, cut so that it does not run into the next column."""
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "..") > width:
        text = text[:-1]
    return text + ".."


def _check_grid(pictures, rows, cols, labels):
    if rows < 1 or cols < 1 or not 1 <= len(pictures) <= rows * cols:
        raise ConfigError(
            f"{len(pictures)} pictures do not fit a grid of {rows} x {cols}", "make_grid"
        )
    if len(labels) != len(pictures):
        raise ConfigError(f"{len(labels)} labels for {len(pictures)} pictures", "make_grid")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ConfigError(f"pictures of different sizes {sorted(sizes)}", "make_grid")

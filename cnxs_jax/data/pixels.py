"""PIL pictures of every mode as RGB with 8 bits: one rule for depth and transparency."""

import numpy as np

from cnxs_jax.errors import ConfigError

STEP = 257  # 65535 / 255


def rgb(picture, where="images"):
    """The PIL picture as RGB; what is transparent in it is white.

    Grey of 16 bits (`I;16`, or `I` as other readers give it) is scaled to 8, where PIL clips.

    Raises ConfigError for modes whose range is not known (`F`, `I` of other values) and for files
    that cannot be decoded.
    """
    from PIL import Image

    try:
        if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
            picture = _of_sixteen_bits(picture, where)
        if picture.has_transparency_data:
            rgba = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return picture.convert("RGB")
    except ValueError:  # Pillow has no way from this mode
        what = f"a picture of mode {picture.mode!r}"
        raise ConfigError(what, where, "save it as RGB") from None
    except (OSError, SyntaxError) as error:
        raise ConfigError(f"damaged picture: {error}", where, "remove it") from None


def _of_sixteen_bits(picture, where):
    """The grey picture with 8 bits, rounded."""
    from PIL import Image

    levels = np.asarray(picture)
    low, high = levels.min(), levels.max()
    # Up to 255 the numbers of an `I` may be those of 8 bits as well.
    known = picture.mode != "F" and low >= 0 and high <= 255 * STEP
    if not known or picture.mode == "I" and 0 < high <= 255:
        what = f"a picture of mode {picture.mode!r} with values from {low:g} to {high:g}"
        raise ConfigError(what, where, "scale it to 0..255 and save it as uint8")
    small = (levels.astype(np.int64) + STEP // 2) // STEP
    small[levels == picture.info.get("transparency", -1)] = 255
    return Image.fromarray(small.astype(np.uint8))

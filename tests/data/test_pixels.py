"""PIL pictures of every mode: depth, transparency, and that all readers take one rule."""

import io

import numpy as np
import pytest
from PIL import Image

from cnxs_jax.data import image_folder, pixels
from cnxs_jax.errors import ConfigError, DataError
from cnxs_jax.pipelines import control, images

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


def stored(picture, kind="PNG", **options):
    """The picture, written and opened."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def levels(picture):
    """The numbers of its three channels, which are equal."""
    found = np.asarray(picture)
    assert (found == found[..., :1]).all()
    return found[..., 0]


READERS = {
    "rgb": pixels.rgb,
    "training and --image": image_folder.turned,
    "array": lambda picture: np.round(255 * images.to_array(picture)).astype(np.uint8),
    "control": lambda picture: control._pictures(picture)[0],
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_every_reader_takes_the_same_rule(reader):
    deep = Image.fromarray(257 * RAMP)
    other_bytes = Image.frombytes("I;16B", (16, 16), (257 * RAMP).astype(">u2").tobytes())
    wide = Image.fromarray(257 * RAMP.astype(np.int32))
    for picture in (deep, stored(deep), stored(deep, "TIFF"), other_bytes, wide):
        assert picture.mode in ("I;16", "I;16B", "I")
        np.testing.assert_array_equal(levels(reader(picture)), RAMP)
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    np.testing.assert_array_equal(np.asarray(reader(clear)), [[[255] * 3, [10, 20, 30]]])


def test_the_ends_and_the_nearest_level():
    values = np.array([[0, 128, 129, 65535 - 129, 65535 - 128, 65535]], np.uint16)
    assert levels(pixels.rgb(Image.fromarray(values))).tolist() == [[0, 0, 1, 254, 255, 255]]


def test_a_transparent_colour_of_every_depth_is_white():
    keyed = stored(Image.fromarray(257 * RAMP), transparency=257 * 7)
    expected = np.where(RAMP == 7, 255, RAMP)
    np.testing.assert_array_equal(levels(pixels.rgb(keyed)), expected)
    keyed = stored(Image.fromarray(RAMP.astype(np.uint8)), transparency=7)
    np.testing.assert_array_equal(levels(pixels.rgb(keyed)), expected)


REFUSED = {
    "F": np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4),
    "NaN": np.full((4, 4), np.nan, np.float32),
    "negative": np.full((4, 4), -1, np.int32),
    "more than 16 bits": np.full((4, 4), 65536, np.int32),
    "8 or 16 bits": np.full((4, 4), 200, np.int32),
}


@pytest.mark.parametrize("given", REFUSED.values(), ids=REFUSED)
def test_a_range_that_is_not_known_is_refused(given):
    picture = Image.fromarray(given)
    with pytest.raises(ConfigError, match=r"(?s)mode '[IF]' with values.*fix: scale") as caught:
        control._pictures(picture)
    assert caught.value.where == "image"
    with pytest.raises(DataError, match="mode '[IF]'"):
        image_folder.turned(picture)


def test_black_is_black_in_either_depth():
    assert not levels(pixels.rgb(Image.new("I", (3, 2)))).any()


def test_a_damaged_file_is_refused():
    file, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    with pytest.raises(ConfigError, match="damaged picture"):
        control._pictures(Image.open(io.BytesIO(file.getvalue()[:4000])))


def test_a_mode_that_cannot_be_converted_is_not_called_damaged():
    with pytest.raises(ConfigError, match="(?s)a picture of mode 'La'.*save it as RGB"):
        pixels.rgb(Image.new("La", (4, 4)))

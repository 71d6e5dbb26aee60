"""Pictures: rounding, the parameters in a PNG, grids."""

import numpy as np
import pytest
from PIL import Image

from cnxs_jax.errors import ConfigError, DataError, NumericsError
from cnxs_jax.pipelines import images

PARAMETERS = {"prompt": 'ein Füchschen 🦊 \n"x"', "seed": 2**32 - 1, "guidance": 4.5}


def test_pixels_are_rounded_to_the_nearest_level():
    values = np.array([0.0, 0.4 / 255, 0.6 / 255, 1.0], np.float32)
    picture = images.to_pil(np.broadcast_to(values[None, None, :, None], (1, 1, 4, 3)))[0]
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_png_keeps_pixels_and_parameters(tmp_path):
    pixels = np.random.default_rng(0).random((8, 6, 3)).astype(np.float32)
    path = tmp_path / "new" / "x.png"
    images.save_png(pixels, path, PARAMETERS)
    assert images.read_parameters(path) == PARAMETERS
    stored = np.asarray(Image.open(path))
    assert stored.shape == (8, 6, 3)
    assert np.abs(stored / 255 - pixels).max() <= 0.5 / 255 + 1e-6
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_png_without_parameters(tmp_path):
    images.save_png(np.zeros((2, 2, 3), np.uint8), tmp_path / "x.png")
    assert images.read_parameters(tmp_path / "x.png") is None


def test_failed_write_leaves_the_old_picture_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    images.save_png(np.zeros((2, 2, 3), np.uint8), path)
    before = path.read_bytes()

    def fail(self, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        images.save_png(np.ones((2, 2, 3), np.uint8), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n123"])
def test_damaged_png_is_a_data_error(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable PNG"):
        images.read_parameters(path)


def _flat(level):
    return np.full((8, 10, 3), level, np.uint8)


def test_levels_at_the_ends_and_the_middle_of_the_range():
    got = images.to_uint8(np.array([0.0, -0.5, 0.5, 1.0, 2.0]))
    np.testing.assert_array_equal(got, [0, 0, 128, 255, 255])


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_is_a_numerics_error(bad):
    with pytest.raises(NumericsError, match="1 of 6 values") as error:
        images.to_uint8(np.array([[0.0, bad, 1.0], [0.0, 0.0, 0.0]]))
    assert error.value.code == 5


def test_grid_places_pictures_row_by_row():
    grid = np.asarray(images.make_grid([_flat(0), _flat(50), _flat(100)], 2, 2, gap=2))
    assert grid.shape == (18, 22, 3)
    assert grid[0, 0, 0] == 0
    assert grid[0, 12, 0] == 50
    assert grid[10, 0, 0] == 100
    assert (grid[10:, 12:] == 255).all()  # the missing fourth
    assert (grid[8:10] == 255).all()  # the gap


def test_grid_labels_take_a_strip_only_where_there_are_any():
    plain = images.make_grid([_flat(0)] * 4, 2, 2)
    grid = images.make_grid([_flat(7)] * 4, 2, 2, labels=["a", "", "", ""])
    strip = images.LABEL_HEIGHT
    assert grid.size == (plain.size[0], plain.size[1] + strip)
    pixels = np.asarray(grid)
    assert (pixels[:strip] < 128).any()
    assert (pixels[strip : strip + 8, :10] == 7).all()


def test_a_long_label_stays_in_its_column():
    wide = [np.full((8, 40, 3), 9, np.uint8)] * 2
    grid = np.asarray(images.make_grid(wide, 1, 2, labels=["a very long label indeed", ""]))
    assert (grid[: images.LABEL_HEIGHT, 42:] == 255).all()


@pytest.mark.parametrize(
    "arguments",
    [([], 1, 1), ([_flat(0)] * 3, 1, 2), ([_flat(0)], 0, 1), ([_flat(0)] * 2, 1, 2, ["a"])],
)
def test_grid_refuses_what_does_not_fit(arguments):
    with pytest.raises(ConfigError):
        images.make_grid(*arguments)


def test_grid_refuses_mixed_sizes_and_ranges():
    with pytest.raises(ConfigError, match="different sizes"):
        images.make_grid([_flat(0), np.zeros((4, 4, 3), np.uint8)], 1, 2)
    with pytest.raises(ConfigError, match=r"\[0,1\]"):
        images.make_grid([np.full((4, 4, 3), 255.0)], 1, 1)

"""Sizes: PixArt's bins, the nearest legal size, resize and crop."""

import numpy as np
import pytest

from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import sizes


@pytest.mark.parametrize(("sample_size", "base"), [(128, 1024), (64, 512), (32, 256)])
def test_bins_cover_the_published_ratios(sample_size, base):
    table = sizes.bins(sample_size, 8)
    assert len(table) == 33
    assert table[1.0] == (base, base)
    assert table[0.25] == (base // 2, 2 * base)
    areas = [h * w / base**2 for h, w in table.values()]
    assert 0.9 < min(areas) <= max(areas) <= 1.0
    assert all(h % 16 == 0 and w % 16 == 0 for h, w in table.values())


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [((1024, 1024), (1024, 1024)), ((720, 1280), (768, 1344)), ((3000, 1000), (1728, 576))],
)
def test_nearest_bin(asked, drawn):
    assert sizes.nearest_bin(*asked, sizes.bins(128, 8)) == drawn


def test_other_models_have_no_bins():
    assert sizes.bins(16, 4) is None
    assert sizes.bins(32, 4) is None  # the published side with another autoencoder


@pytest.mark.parametrize(
    ("side", "two"), [(65, "64 and 72"), (7, "8 and 16"), (1023, "1016 and 1024")]
)
def test_message_names_the_two_nearest_sizes(side, two):
    with pytest.raises(ConfigError, match=f"two nearest sizes are {two}"):
        sizes.check_side("height", side, 8)


@pytest.mark.parametrize("side", [0, -8, True, 8.0, "8", 8200, None])
def test_sides_that_are_no_sizes(side):
    with pytest.raises(ConfigError, match="expected 1 to 8192 pixels"):
        sizes.check_side("width", side, 8)


def test_resize_and_crop_cuts_the_middle():
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[None, None, :, None], (1, 4, 8, 3))
    out = np.asarray(sizes.resize_and_crop(ramp, 4, 4))
    assert out.shape == (1, 4, 4, 3)
    assert out[0, 0, :, 0].tolist() == [2, 3, 4, 5]

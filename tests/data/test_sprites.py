"""The committed sprite file holds what the licences and the build script say."""

import json

import numpy as np
import pytest

from cnxs_jax import errors
from cnxs_jax.data import build_sprites, emoji_scenes


def test_file_matches_the_build_script():
    assert emoji_scenes.SPRITES.stat().st_size < 2_000_000
    assert emoji_scenes.STYLES == build_sprites.STYLES
    with np.load(emoji_scenes.SPRITES, allow_pickle=False) as data:
        index = json.loads(data["index"].tobytes())
    wanted = [(c, s, n) for c, n in build_sprites.CONCEPTS.items() for s in build_sprites.STYLES]
    assert [(e["concept"], e["style"], e["cldr"]) for e in index] == wanted
    assert len(wanted) == 160


def test_sprites_fill_their_box():
    for (concept, style), image in emoji_scenes.sprite_images().items():
        assert max(image.size) == 64
        for extent in (19, 38):
            rgba = emoji_scenes.render(concept, style, extent)
            assert max(rgba.shape[:2]) == extent
            assert (rgba[..., :3] <= rgba[..., 3:]).all()
            solid = rgba[..., 3] >= 128
            assert solid.mean() > 0.2, (concept, style)
            drawn = rgba[..., 3] > 8
            assert min(drawn[0].any(), drawn[-1].any(), drawn[:, 0].any(), drawn[:, -1].any())


def test_a_changed_package_is_refused(tmp_path):
    name, _ = build_sprites.PACKAGES["flat"]
    with pytest.raises(errors.DataError, match="package missing"):
        build_sprites.open_package(tmp_path, "flat")
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(errors.DataError, match="SHA-256"):
        build_sprites.open_package(tmp_path, "flat")


def test_too_many_concepts():
    assert len(emoji_scenes.world(40).concepts) == 40
    with pytest.raises(errors.ConfigError, match="use 3 to 40"):
        emoji_scenes.world(41)

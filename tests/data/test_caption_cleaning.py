"""Caption cleaning: leaves plain captions alone, removes what PixArt removes, stays fast."""

import time

import pytest

from cnxs_jax import errors
from cnxs_jax.data import caption_cleaning, emoji_scenes


def test_captions_of_the_embedded_world_pass_unchanged():
    for seed in range(500):
        caption = emoji_scenes.make_scene(seed, truth=False)["caption"]
        assert caption_cleaning.clean_caption(caption) == caption


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A Tiger", "a tiger"),
        ("a <b>tiger</b> &amp; a frog", "a tiger a frog"),
        ("tiger from www.tigers.com/photos by @someone", "tiger from by"),
        ("tiger_photo_final.png of a tiger", "of a tiger"),
        ("a tiger 640x480 #123", "a tiger"),
        ("this-is-my-cute-cat", "this is my cute cat"),
        ("a tiger — in ‘deep’ snow 老虎", "a tiger - in 'deep' snow"),
        ("", ""),
    ],
)
def test_rules(raw, clean):
    assert caption_cleaning.clean_caption(raw) == clean


@pytest.mark.parametrize("unit", ["a.", "a-", "<", "1a", "&amp;", '"', "a1", "((", "1.1.", "\\n"])
def test_hostile_captions_stay_fast(unit):
    start = time.perf_counter()
    caption_cleaning.clean_caption((unit * 2000)[:2000])
    assert time.perf_counter() - start < 2


def test_over_long_caption_is_refused_before_cleaning():
    with pytest.raises(errors.ConfigError, match="limit 2000"):
        caption_cleaning.clean_caption("a." * 1001)

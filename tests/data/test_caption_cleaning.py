"""Caption cleaning: leaves plain captions alone, removes what PixArt removes, stays fast."""

import time

import numpy as np
import pytest
from PIL import Image

import configs.pixart_lcm
from cnxs_jax import errors
from cnxs_jax.data import caption_cleaning, emoji_scenes, text
from cnxs_jax.pipelines import pixart
from tests.pipelines import tiny
from train import inputs


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


CAPTION = "A <b>Red</b> fox &amp; two blue cats http://example.com/fox.jpg"


@pytest.mark.filterwarnings("ignore:caption has")
@pytest.mark.parametrize("in_buckets", [False, True])
def test_training_and_drawing_read_the_same_ids(in_buckets, tmp_path, monkeypatch):
    """A caption of one's own picture, through the trainer's loader and through the pipeline."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(CAPTION)
    pipe = tiny.pipeline(tmp_path / "tokens")
    config = configs.pixart_lcm.get_config("smoke")
    config.batch_size, config.data.size = 1, 256
    config.data.source, config.data.root = "image_folder", str(tmp_path)
    config.data.buckets, config.data.max_length = in_buckets, pipe.max_tokens
    loader, tokenizer = inputs.open_loader(config, tokenizer_path=tmp_path / "tokens")
    seen = []
    monkeypatch.setattr(pixart, "encode_text", lambda net, params, *ids: seen.append(ids) or ids[0])
    pipe._text([CAPTION], 1)
    trained = next(loader)
    for name, ids in zip(("input_ids", "attention_mask"), seen[0], strict=True):
        np.testing.assert_array_equal(trained[name], ids)
        np.testing.assert_array_equal(inputs.tokens(config, tokenizer, [CAPTION])[name], ids)
    plain, _ = text.tokenize(tokenizer, [CAPTION], pipe.max_tokens)
    assert not np.array_equal(trained["input_ids"], plain)

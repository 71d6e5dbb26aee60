"""The shipped tokenizer: whole words, any text, T5's conventions, honest truncation."""

import pathlib
import warnings

import numpy as np
import pytest

import cnxs_jax
from cnxs_jax import errors
from cnxs_jax.data import emoji_scenes, shapes, text

SHIPPED = pathlib.Path(cnxs_jax.__file__).parent / "assets" / "pixart_tiny" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer(SHIPPED)


def test_every_word_of_the_worlds_is_one_piece(tokenizer):
    captions = [emoji_scenes.make_scene(i, truth=False)["caption"] for i in range(500)]
    captions += [shapes.make_scene(i, truth=False)["caption"] for i in range(200)]
    for caption in captions:
        words = caption.replace(",", " ,").split()
        pieces = tokenizer.tokenize(caption)
        assert [p.removeprefix("▁") for p in pieces] == words
        assert tokenizer.decode(tokenizer(caption)["input_ids"][:-1]) == caption


def test_longest_caption_fits(tokenizer):
    lengths = [len(ids) for ids in tokenizer(list(text.world_captions(3000)))["input_ids"]]
    assert 18 <= max(lengths) <= text.MAX_LENGTH


def test_any_text_tokenises(tokenizer):
    ids = tokenizer("Two TIGERS, 47% off — naïve?! ☃")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert ids.count(tokenizer.unk_token_id) == 2  # the dash and the snowman
    assert tokenizer.pad_token_id == 0
    assert max(ids) < len(tokenizer) == 168


def test_sentencepiece_and_transformers_agree(tokenizer):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(SHIPPED / "spiece.model"))
    captions = list(text.world_captions(200)) + ["Two TIGERS, 47% off!", "  spaces  ", "gelb ö ☃"]
    for caption in captions:
        assert tokenizer(caption)["input_ids"] == reference.encode(caption) + [1]


def test_training_again_gives_the_shipped_file():
    trained = text.train_tokenizer(text.world_captions())
    assert trained == (SHIPPED / "spiece.model").read_bytes()


def test_a_trained_tokenizer_is_saved_and_read(tmp_path):
    text.save_tokenizer(text.train_tokenizer(["a red dog", "a blue dog"]), tmp_path)
    again = text.load_tokenizer(tmp_path)
    assert again.tokenize("a red dog") == ["▁a", "▁red", "▁dog"]
    assert again.tokenize("god") == ["▁", "g", "o", "d"]


def test_tokenize_pads_and_masks(tokenizer):
    ids, mask = text.tokenize(tokenizer, ["", "a tiger"], 6)
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(ids[0], [1, 0, 0, 0, 0, 0])
    assert ids[1, 2] == 1
    assert ids.dtype == mask.dtype == np.int32
    assert text.tokenize(tokenizer, "a tiger", 6)[0].shape == (1, 6)
    assert text.tokenize(tokenizer, [], 6)[0].shape == (0, 6)


def test_truncation_warns_with_the_lost_words(tokenizer):
    with pytest.warns(UserWarning, match="dropped: 'on a blue background'"):
        ids, mask = text.tokenize(tokenizer, ["a tiger on a blue background"], 3)
    assert ids[0, -1] == 1
    assert mask.sum() == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.tokenize(tokenizer, ["a tiger on a blue background"], 7)


@pytest.mark.parametrize("caption", ["x" * 2001, None, 3])
def test_bad_captions_are_refused(tokenizer, caption):
    with pytest.raises(errors.ConfigError):
        text.tokenize(tokenizer, [caption], 8)


def test_missing_and_broken_tokenizers(tmp_path):
    with pytest.raises(errors.DataError, match="no tokenizer found"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(errors.DataError, match="unreadable tokenizer"):
        text.load_tokenizer(tmp_path)

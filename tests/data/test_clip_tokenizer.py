"""The CLIP tokenizer of the scenes: whole words, any text, the shipped files, transformers' own."""

import json
import pathlib

import pytest

import cnxs_jax
from cnxs_jax import errors
from cnxs_jax.data import clip_tokenizer, text

SHIPPED = pathlib.Path(cnxs_jax.__file__).parent / "assets" / "sd_tiny" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return text.load_tokenizer(SHIPPED)


def test_every_word_of_the_scenes_is_one_token(tokenizer):
    for caption in text.world_captions(300):
        words = caption.replace(",", " ,").replace("3d", "3 d").split()  # CLIP parts digits
        assert [t.removesuffix("</w>") for t in tokenizer.tokenize(caption)] == words


def test_texts_start_and_end_as_clip_has_them(tokenizer):
    assert type(tokenizer).__name__.startswith("CLIPTokenizer")
    ids, mask = text.tokenize(tokenizer, ["a crab", ""])
    assert ids[0, 0] == ids[1, 0] == tokenizer.bos_token_id == 789
    assert ids[0, 3] == ids[1, 1] == ids[1, -1] == tokenizer.eos_token_id == 790
    assert mask.sum(axis=1).tolist() == [4, 2]
    assert len(tokenizer) == 791


def test_the_longest_caption_fits(tokenizer):
    lengths = [len(ids) for ids in tokenizer(list(text.world_captions(3000)))["input_ids"]]
    assert 18 <= max(lengths) <= text.MAX_LENGTH == tokenizer.model_max_length


def test_any_text_becomes_bytes_and_comes_back(tokenizer):
    given = "two tigers, 47% off - naïve?! ☃"
    ids = tokenizer(given)["input_ids"]
    assert tokenizer.eos_token_id not in ids[:-1]  # which would also mean "unknown"
    spelled = tokenizer.decode(ids[1:-1]).replace(" ", "")
    assert spelled == given.replace(" ", "")


def test_training_again_gives_the_shipped_files(tmp_path):
    clip_tokenizer.save(*clip_tokenizer.train(text.world_captions()), tmp_path)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_merges_keep_earlier_words_whole():
    words = ["abab", "ab", "bab", "a", "abba"]
    merges = clip_tokenizer.learn_merges(words)
    ranks = {pair: i for i, pair in enumerate(merges)}
    for word in words:
        assert clip_tokenizer.split(word, ranks) == [word + "</w>"]
    assert clip_tokenizer.split("ba", ranks) == ["b", "a</w>"]


def test_tokens_are_numbered_without_gaps():
    vocabulary = json.loads((SHIPPED / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len({*clip_tokenizer.byte_symbols()}) == 256


def test_captions_without_words_are_refused():
    with pytest.raises(errors.DataError, match="no words"):
        clip_tokenizer.train(["", "123"])

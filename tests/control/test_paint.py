"""Phrases to tokens, masks to arrays, colours to masks."""

import pathlib

import numpy as np
import pytest

import cnxs_jax
from cnxs_jax.control import paint
from cnxs_jax.data.text import load_tokenizer
from cnxs_jax.errors import ConfigError

ASSETS = pathlib.Path(cnxs_jax.__file__).parent / "assets"
ON = np.ones((4, 4))
LEFT = np.concatenate([np.ones((4, 2)), np.zeros((4, 2))], axis=1)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "pixart_tiny" / "tokenizer")


class WithoutOffsets:
    """The same tokenizer as one in Python would be: ids alone."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.all_special_ids = tokenizer.all_special_ids

    def __call__(self, text, add_special_tokens=True):
        return self.tokenizer(text, add_special_tokens=add_special_tokens)


class Letters:
    """A second tokenisation of the same prompt: a start token, then one token a letter."""

    is_fast = True
    all_special_ids = (0, 1)

    def __call__(self, text, return_offsets_mapping=False):
        offsets = [(0, 0), *((i, i + 1) for i in range(len(text))), (0, 0)]
        return {"input_ids": [0, *map(ord, text), 1], "offset_mapping": offsets}


def read(tokenizer, prompt, tokens):
    ids = tokenizer(prompt)["input_ids"]
    return tokenizer.decode([ids[i] for i in tokens])


PROMPT = "a dog and a red apple with a green apple"


@pytest.mark.parametrize("wrap", [lambda t: t, WithoutOffsets])
def test_phrases_are_found_where_they_stand(tokenizer, wrap):
    def found(phrase):
        places = paint.phrase_tokens(wrap(tokenizer), PROMPT, phrase)
        return [read(tokenizer, PROMPT, p) for p in places]

    assert found("red apple") == ["red apple"]
    assert found("apple") == ["apple", "apple"]
    assert found("apple#2") == ["apple"]
    first, second = paint.phrase_tokens(wrap(tokenizer), PROMPT, "apple")
    assert paint.phrase_tokens(wrap(tokenizer), PROMPT, "apple#2") == [second]
    assert paint.phrase_tokens(wrap(tokenizer), PROMPT, "apple#1") == [first]
    assert set(paint.phrase_tokens(wrap(tokenizer), PROMPT, "green apple")[0]) > set(second)


def test_words_of_unknown_letters_are_painted_whole(tokenizer):
    (tokens,) = paint.phrase_tokens(tokenizer, "a zyxw dog", "ZYXW")
    assert len(tokens) >= 4
    assert read(tokenizer, "a zyxw dog", tokens) == "zyxw"


@pytest.mark.parametrize(
    ("phrase", "message"),
    [
        ("cat", "'cat' is not in the prompt"),
        ("app", "'app' is not in the prompt"),
        ("apple#3", "'apple' occurs 2 times"),
        ("apple#0", "'apple' occurs 2 times"),
        ("cat#1", "'cat' is not in the prompt"),
        (" ", "empty"),
    ],
)
def test_phrases_that_are_not_there_are_errors(tokenizer, phrase, message):
    with pytest.raises(ConfigError, match=message):
        paint.phrase_tokens(tokenizer, PROMPT, phrase)


def test_a_phrase_is_painted_in_every_encoders_tokens(tokenizer):
    masks = {"apple#2": LEFT, "dog": (ON, 0.5)}
    mask, tokens = paint.word_mask([(tokenizer, 24), (Letters(), 50)], PROMPT, masks, (8, 8))
    assert mask.shape == (8, 8, 74)
    apple = [24 + 1 + i for i in range(len(PROMPT) - 5, len(PROMPT))]
    np.testing.assert_array_equal(mask[0, 0, apple], 1.0)
    np.testing.assert_array_equal(mask[0, 7, apple], 0.0)  # the right half
    np.testing.assert_array_equal(mask[..., 24 + 1 + 2], 0.5)  # the d of "dog"
    first = [24 + 1 + i for i in range(PROMPT.index("apple"), PROMPT.index("apple") + 5)]
    np.testing.assert_array_equal(mask[..., first], 0.0)
    own = [i for w in masks for p in paint.phrase_tokens(tokenizer, PROMPT, w) for i in p]
    np.testing.assert_array_equal(np.flatnonzero(mask[0, 0, :24]), sorted(own))
    assert tokens[:24].sum() == len(tokenizer(PROMPT)["input_ids"]) - 1  # without the end token
    assert tokens[24:].sum() == len(PROMPT)
    assert tokens[24] == 0  # the start token


def test_a_phrase_behind_the_limit_is_an_error_and_not_the_end_token(tokenizer):
    length = 12
    with pytest.raises(ConfigError, match="'green apple' is beyond the 12 tokens"):
        paint.word_mask([(tokenizer, length)], PROMPT, {"green apple": ON}, (4, 4))
    mask, tokens = paint.word_mask([(tokenizer, length)], PROMPT, {"apple": ON, "red": ON}, (4, 4))
    assert np.count_nonzero(mask[0, 0]) == 4  # "red" and the seen part of the first "apple"
    np.testing.assert_array_equal(mask[..., -1], 0.0)
    assert tokens[-1] == 0


def test_overlapping_phrases_keep_the_larger_value(tokenizer):
    masks = {"red apple": (ON, 0.3), "apple": LEFT}
    mask, _ = paint.word_mask([(tokenizer, 24)], PROMPT, masks, (4, 4))
    red, *apple = paint.phrase_tokens(tokenizer, PROMPT, "red apple")[0]
    np.testing.assert_allclose(mask[0, :, apple[0]], [1, 1, 0.3, 0.3])
    np.testing.assert_allclose(mask[0, :, red], 0.3)


def test_batches_may_mix_painted_and_plain_prompts(tokenizer):
    contexts = [(tokenizer, 24)]
    cond, null = paint.word_condition(contexts, [PROMPT, "a dog"], [{"dog": ON}, None], (4, 4))
    assert cond["word_mask"].shape == (2, 4, 4, 24)
    (dog,) = paint.phrase_tokens(tokenizer, PROMPT, "dog")
    assert cond["word_mask"][0].sum() == 16 * len(dog)
    assert not cond["word_mask"][1].any()
    np.testing.assert_allclose(cond["word_weight"], 0.3)
    np.testing.assert_array_equal(null["word_weight"], [0, 0])


@pytest.mark.parametrize(
    ("masks", "weight", "message"),
    [
        ({"dog": np.ones((4, 4, 3))}, 0.2, "shape"),
        ({"dog": 2 * ON}, 0.2, "in .0, 1"),
        ({"dog": np.full((4, 4), np.nan)}, 0.2, "in .0, 1"),
        ({"dog": (ON, -1.0)}, 0.2, "weight of 'dog'"),
        ({"dog": (ON, "2")}, 0.2, "weight of 'dog' is '2'"),
        ({"dog": (ON, None)}, 0.2, "weight of 'dog' is None"),
        ({"dog": (ON, [[1], [1, 2]])}, 0.2, "weight of 'dog'"),
        ({"dog": (ON, 1e39)}, 0.2, "weight of 'dog' is 1e"),
        ({"dog": (ON,)}, 0.2, "'dog' has 1 values"),
        ({"dog": [ON, 1.5]}, 0.2, "'dog' is no array"),
        ({"dog": "left"}, 0.2, "'dog' is no array"),
        ({"dog": [[1.0], [1.0, 0.0]]}, 0.2, "'dog' is no array"),
        ({3: ON}, 0.2, "3 is no phrase"),
        ({"dog": ON}, -0.2, "weight is -0.2"),
        ({"dog": ON}, float("nan"), "weight is nan"),
    ],
)
def test_bad_masks_and_weights_are_refused(tokenizer, masks, weight, message):
    with pytest.raises(ConfigError, match=message):
        paint.word_condition([(tokenizer, 24)], [PROMPT], [masks], (4, 4), weight)


def test_colours_take_the_blended_pixels_of_their_edges():
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, :4] = (255, 0, 0)
    picture[:, 3] = (220, 30, 30)  # antialiased
    picture[:, 4:6] = (0, 0, 255)
    picture[:, 6:] = (255, 255, 255)
    phrases = {"#ff0000": "a dog", (0, 0, 255): "an apple"}
    masks = paint.colour_masks(picture, phrases)
    np.testing.assert_array_equal(masks["a dog"][0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(masks["an apple"][0], [0, 0, 0, 0, 1, 1, 0, 0])
    exact = paint.colour_masks(picture, phrases, tolerance=0)
    np.testing.assert_array_equal(exact["a dog"][0], [1, 1, 1, 0, 0, 0, 0, 0])
    both = paint.colour_masks(picture, {"#ff0000": "a dog", "#0000ff": "a dog"})
    assert both["a dog"].sum() == 24


def test_colours_that_do_not_occur_or_are_none_are_errors():
    picture = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ConfigError, match="of 'a dog' is not in the picture"):
        paint.colour_masks(picture, {"#ff0000": "a dog"})
    with pytest.raises(ConfigError, match="no colour"):
        paint.colour_masks(picture, {"red": "a dog"})
    with pytest.raises(ConfigError, match="no colour"):
        paint.colour_masks(picture, {(0, 0, 300): "a dog"})
    with pytest.raises(ConfigError, match="which phrase a colour paints"):
        paint.colour_masks(picture, ["#000000"])
    with pytest.raises(ConfigError, match="uint8"):
        paint.colour_masks(picture / 255.0, {"#000000": "a dog"})

"""Paint-with-words: from phrases and masks to the arrays that cross-attention reads.

    masks = colour_masks(picture, {"#ff0000": "a red ball", (0, 0, 255): "squirrel#2"})
    cond |= word_condition([(tokenizer, 120)], [prompt], [masks], size=(64, 64))

The arrays and the score bias: `cnxs_jax.models.painting` (eDiff-I, arXiv 2211.01324, 4.3).
"""

import re

import numpy as np

from cnxs_jax.errors import ConfigError

WHERE = "word_masks"
RECOMMENDED_WEIGHT = 0.3  # 0.4 breaks things, 0.1 places few (docs/results/ediff_i.md)
OCCURRENCE = re.compile(r"^(.*)#(\d+)$", re.DOTALL)


def phrase_tokens(tokenizer, prompt, phrase):
    """Token positions of `phrase` in the tokenised `prompt`, one tuple an occurrence.

    Matches whole words without regard to case and white space; "ball#2" is the second "ball".
    Positions count the special tokens that the tokenizer adds.

    Args:
        tokenizer: of transformers or callable like one; a phrase is found by character offsets
            where the tokenizer knows them, else as a run of token ids.

    Raises:
        ConfigError: the phrase, or that occurrence of it, is not in the prompt.
    """
    found = _occurrences(tokenizer, prompt, phrase)
    numbered = OCCURRENCE.match(phrase)
    if found or not numbered:  # a phrase may hold "#2" itself
        return _known(found, prompt, phrase)
    bare, number = numbered[1], int(numbered[2])
    found = _known(_occurrences(tokenizer, prompt, bare), prompt, bare)
    if not 1 <= number <= len(found):
        raise ConfigError(f"{bare!r} occurs {len(found)} times in {prompt!r}, not {number}", WHERE)
    return [found[number - 1]]


def _known(found, prompt, phrase):
    if not found:
        raise ConfigError(
            f"the phrase {phrase!r} is not in the prompt {prompt!r}",
            WHERE,
            "paint only phrases of the prompt, whole words in its spelling",
        )
    return found


def _occurrences(tokenizer, prompt, phrase):
    words = phrase.split()
    if not words:
        raise ConfigError("a painted phrase is empty", WHERE)
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        body = r"\s+".join(map(re.escape, words))
        spans = re.finditer(rf"(?<!\w){body}(?!\w)", prompt, re.IGNORECASE)
        return [o for o in (_overlapping(offsets, *m.span()) for m in spans) if o]
    ids = tokenizer(prompt)["input_ids"]
    wanted = tokenizer(phrase, add_special_tokens=False)["input_ids"]
    starts = range(len(ids) - len(wanted) + 1)
    return [tuple(range(i, i + len(wanted))) for i in starts if ids[i : i + len(wanted)] == wanted]


def _overlapping(offsets, start, end):
    """Tokens that share a character with [start, end); special tokens have no characters."""
    return tuple(i for i, (a, b) in enumerate(offsets) if max(a, start) < min(b, end))


def word_mask(contexts, prompt, masks, size):
    """`(mask float32 [H,W,L], tokens int32 [L])` of one prompt.

    Args:
        contexts: `(tokenizer, length)` of each text encoder in the order of the model's context;
            a phrase is painted in each of them, however it is cut into tokens there.
        masks: phrase -> `[h,w]` in [0, 1], or `(mask, weight)` with a weight of its own. Painting
            one token twice keeps the larger value.
        size: (H, W), any resolution at or above that of the model's attention.

    `tokens` marks the tokens of words, without start, end and padding.

    Raises:
        ConfigError: a phrase that is not in the prompt, or only in the part that the encoder does
            not see; a mask that is no picture of numbers in [0, 1].
    """
    fields = {phrase: _field(phrase, mask, size) for phrase, mask in masks.items()}
    columns, tokens = [], []
    for tokenizer, length in contexts:
        ids = tokenizer(prompt)["input_ids"]
        # What does not fit is dropped before the end token, which stays.
        seen = len(ids) if len(ids) <= length else length - 1
        part = np.zeros((*size, length), np.float32)
        for phrase, field in fields.items():
            places = [i for o in phrase_tokens(tokenizer, prompt, phrase) for i in o]
            if min(places) >= seen:
                raise ConfigError(
                    f"the phrase {phrase!r} is beyond the {length} tokens that are read",
                    WHERE,
                    "shorten the prompt",
                )
            for i in places:
                if i < seen:
                    part[..., i] = np.maximum(part[..., i], field)
        columns.append(part)
        special = set(tokenizer.all_special_ids)
        real = [i < seen and ids[i] not in special for i in range(min(len(ids), length))]
        tokens.append(np.pad(np.array(real, np.int32), (0, length - len(real))))
    return np.concatenate(columns, axis=-1), np.concatenate(tokens)


def _field(phrase, given, size):
    """A mask times its weight at `size`, float32 [H,W]."""
    fix = "give phrase -> mask [h, w] of numbers in [0, 1], or (mask, weight)"
    if not isinstance(phrase, str):
        raise ConfigError(f"{phrase!r} is no phrase", WHERE, fix)
    if isinstance(given, tuple) and len(given) != 2:
        raise ConfigError(f"{phrase!r} has {len(given)} values, not (mask, weight)", WHERE, fix)
    mask, weight = given if isinstance(given, tuple) else (given, 1.0)
    try:
        mask = np.asarray(mask, np.float32)
    except (TypeError, ValueError):  # ragged, or no numbers
        raise ConfigError(f"the mask of {phrase!r} is no array of numbers", WHERE, fix) from None
    if mask.ndim != 2 or not mask.size or not np.all((mask >= 0) & (mask <= 1)):
        raise ConfigError(
            f"the mask of {phrase!r} has shape {mask.shape}, expected [h, w] in [0, 1]", WHERE
        )
    number = np.shape(weight) == () if hasattr(weight, "dtype") else isinstance(weight, int | float)
    if not number or not 0 <= weight <= float(np.finfo(np.float32).max):
        raise ConfigError(f"the weight of {phrase!r} is {weight!r}, expected a number >= 0", WHERE)
    from PIL import Image

    resized = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.BOX)
    return np.float32(weight) * np.asarray(resized, np.float32)


def word_condition(contexts, prompts, masks, size, weight=RECOMMENDED_WEIGHT):
    """The keys of `cond` for a batch: `word_mask`, `word_tokens`, `word_weight`, and for `null`.

    Args:
        prompts: B str.
        masks: B dicts as `word_mask` takes them, empty or None where nothing is painted.
        weight: w' of the score bias, one number or [B].

    Returns:
        `(cond, null)`: the unconditional half of guidance is not painted.
    """
    if len(masks) != len(prompts):
        raise ConfigError(f"{len(masks)} sets of masks for {len(prompts)} prompts", WHERE)
    pairs = [word_mask(contexts, p, m or {}, size) for p, m in zip(prompts, masks, strict=True)]
    weights = np.broadcast_to(np.asarray(weight, np.float32), (len(prompts),))
    if not np.all((weights >= 0) & np.isfinite(weights)):
        raise ConfigError(f"the weight is {weight}, expected >= 0", WHERE)
    cond = {
        "word_mask": np.stack([mask for mask, _ in pairs]),
        "word_tokens": np.stack([tokens for _, tokens in pairs]),
        "word_weight": weights.copy(),
    }
    return cond, {"word_weight": np.zeros_like(weights)}


def colour_masks(picture, phrases, tolerance=48):
    """phrase -> bool `[h,w]` from a painted picture.

    Each pixel goes to the nearest of the given colours if no channel differs by more than
    `tolerance`, so that the blended pixels of antialiased edges leave no holes.

    Args:
        picture: uint8 `[h,w,3]`, or a PIL picture.
        phrases: colour -> phrase; a colour is "#rrggbb" or (r, g, b). Colours may share a phrase.

    Raises:
        ConfigError: no colour, a colour that is none, or one that does not occur in the picture.
    """
    if not isinstance(phrases, dict):
        raise ConfigError(f"{phrases!r} does not say which phrase a colour paints", WHERE,
                          'give colour -> phrase, {"#ff0000": "a ball"}')  # fmt: skip
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[-1] < 3 or picture.dtype != np.uint8:
        raise ConfigError(f"expected uint8 [h,w,3], got {picture.dtype} {picture.shape}", WHERE)
    colours = np.array([_rgb(c) for c in phrases], np.int32).reshape(-1, 3)
    if not len(colours):
        raise ConfigError("there are no colours", WHERE)
    distance = np.abs(picture[..., None, :3].astype(np.int32) - colours).max(-1)  # [h,w,colours]
    nearest = np.where(distance.min(-1) <= tolerance, distance.argmin(-1), -1)
    masks = {}
    for i, (colour, phrase) in enumerate(phrases.items()):
        if not np.any(nearest == i):
            raise ConfigError(
                f"colour {colour} of {phrase!r} is not in the picture",
                WHERE,
                f"use one of its colours or a tolerance above {tolerance}",
            )
        masks[phrase] = masks.get(phrase, False) | (nearest == i)
    return masks


def _rgb(colour):
    """(r, g, b) of "#rrggbb" or of three numbers from 0 to 255."""
    if isinstance(colour, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", colour):
        return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    good = isinstance(colour, tuple) and len(colour) == 3
    if good and all(isinstance(v, int) and 0 <= v <= 255 for v in colour):
        return colour
    raise ConfigError(f"{colour!r} is no colour", WHERE, 'write "#rrggbb" or (r, g, b)')

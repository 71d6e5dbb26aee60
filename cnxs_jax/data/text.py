"""Captions to token ids; and the tiny tokenizer of the embedded worlds.

    python -m cnxs_jax.data.text --out=cnxs_jax/assets/pixart_tiny/tokenizer

writes the tokenizer that is shipped: a SentencePiece unigram model with T5's special ids in which
each caption word is one piece and any other text falls back to letters.
"""

import argparse
import collections
import io
import math
import os
import pathlib
import re
import string
import warnings

import numpy as np

from cnxs_jax import errors
from cnxs_jax.storage import write_json

MAX_CHARACTERS = 2000
QUOTED = 60  # characters of what a warning says is dropped
MAX_LENGTH = 24  # tokens of an embedded caption, end token included
LETTERS = string.ascii_lowercase + string.digits + string.punctuation + "ßàáâäåæçèéêëìíîïñòóôöøùúûü"
LETTER_SCORE = -12.0  # below every word's, so that words win; log probabilities


def train_tokenizer(captions):
    """A SentencePiece unigram model of `captions`, as the bytes of `spiece.model`.

    Ids 0, 1, 2 are `<pad>`, `</s>`, `<unk>` (T5's); then one piece a caption word, the most
    frequent first, with its log frequency as score; then "▁" and single characters. The trainer
    of SentencePiece supplies the normaliser (NFKC and case folding); the pieces are set here,
    because its pruning splits short words at so small a vocabulary.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    captions = list(captions)
    if not captions:
        raise errors.DataError("no captions", "train_tokenizer", "give at least one")
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=buffer, model_type="unigram",
        vocab_size=300, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf", num_threads=1, minloglevel=2,
    )  # fmt: skip
    model = model_pb2.ModelProto()
    model.ParseFromString(buffer.getvalue())
    counts = collections.Counter(w for c in captions for w in re.findall(r"\w+", c.lower()))
    total = sum(counts.values())
    pieces = [(p.piece, p.score, p.type) for p in model.pieces[:3]]
    normal = model_pb2.ModelProto.SentencePiece.NORMAL
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        pieces.append(("▁" + word, math.log(count / total), normal))
    seen = {p[0] for p in pieces}
    pieces += [(c, LETTER_SCORE, normal) for c in "▁" + LETTERS if c not in seen]
    del model.pieces[:]
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.vocab_size = len(pieces)
    return model.SerializeToString(deterministic=True)


def import_transformers():
    """transformers, without its advice to install PyTorch: nothing here needs it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def save_tokenizer(model_bytes, directory):
    """Writes `spiece.model`, `tokenizer.json` and `tokenizer_config.json`.

    The first is what the T5 tokenizers of transformers 4 read, the second those of transformers 5.
    """
    transformers = import_transformers()
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for old in ("tokenizer.json", "spiece.model"):
        (directory / old).unlink(missing_ok=True)
    (directory / "spiece.model").write_bytes(model_bytes)
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "additional_special_tokens": [],
        "model_max_length": 120,
        "legacy": False,
    }
    write_json(directory / "tokenizer_config.json", config, sort_keys=False)
    tokenizer = transformers.T5Tokenizer.from_pretrained(directory, local_files_only=True)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))


def load_tokenizer(directory):
    """The tokenizer of a diffusers or transformers directory, read offline.

    Raises:
        errors.DataError: no readable tokenizer there.
    """
    directory = pathlib.Path(directory)
    names = ("spiece.model", "tokenizer.json", "vocab.json")
    if not any((directory / n).is_file() for n in names):
        fix = f"give a directory with one of {names}"
        raise errors.DataError("no tokenizer found", directory, fix)
    transformers = import_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise errors.DataError(
            f"unreadable tokenizer: {error}", directory, "get it again"
        ) from error


def tokenize(tokenizer, captions, max_length=MAX_LENGTH):
    """Token ids with end token, padded to `max_length`.

    Args:
        tokenizer: from `load_tokenizer`.
        captions: str, or a list of B str. An empty caption gives the end token alone.
        max_length: L; what does not fit is dropped with a warning that quotes it.

    Returns:
        `(ids int32 [B,L], mask int32 [B,L])`, mask 1 for real tokens.

    Raises:
        errors.ConfigError: a caption is no str or longer than 2000 characters.
    """
    captions = [captions] if isinstance(captions, str) else list(captions)
    for caption in captions:
        check_caption(caption)
    if max_length < 1:
        raise errors.ConfigError(f"max_length is {max_length}", "max_length", "use 1 or more")
    ids = np.full((len(captions), max_length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros_like(ids)
    # verbose: transformers warns of long texts, too, and of errors that do not come.
    found = tokenizer(captions, verbose=False)["input_ids"] if captions else []
    for row, tokens in enumerate(found):
        if len(tokens) > max_length:
            lost = tokenizer.decode(tokens[max_length - 1 : -1])
            if len(lost) > QUOTED:  # its beginning and its end
                lost = f"{lost[: QUOTED // 2]} ... {lost[-QUOTED // 2 :]}"
            message = f"caption has {len(tokens)} tokens, limit {max_length}; dropped: {lost!r}"
            warnings.warn(message, stacklevel=2)
            tokens = tokens[: max_length - 1] + tokens[-1:]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


def spelled_out(tokenizer, caption):
    """The caption's words of four letters or more that the tokenizer knows by their letters alone.

    To a model that was trained on a closed vocabulary they mean nothing.
    """
    words = dict.fromkeys(re.findall(r"[^\W\d_]{4,}", caption.lower()))
    pieces = {word: tokenizer.tokenize(word) for word in words}
    letters = {
        word: [p.strip("\u2581").removesuffix("</w>") for p in pieces[word]] for word in words
    }
    return [word for word in words if max(map(len, letters[word]), default=0) <= 1]


def check_caption(caption):
    """Raises ConfigError for what is no str, or too long to be worth cleaning or tokenising."""
    if not isinstance(caption, str):
        what = f"a prompt is {type(caption).__name__}, expected str"
        raise errors.ConfigError(what, "prompt", "give a str or a list of str")
    if len(caption) > MAX_CHARACTERS:
        what = f"a prompt has {len(caption)} characters, limit {MAX_CHARACTERS}"
        raise errors.ConfigError(what, "prompt", "shorten it; models read 24 to 300 tokens")


def world_captions(count=6000):
    """Captions of the embedded worlds that hold every word of theirs, for the tokenizer."""
    from cnxs_jax.data import emoji_scenes, scenes, shapes

    rng = np.random.default_rng(0)
    for world, share in ((emoji_scenes.world(40), count), (shapes.world(), count // 6)):
        for i in range(share):
            facts = scenes.draw_facts(world, scenes.scene_rng(world.name, "train", i), {}, "train")
            yield scenes.write_caption(facts["prompt"], rng)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Trains the tokenizer of the embedded worlds.")
    parser.add_argument("--out", required=True, help="directory to write")
    args = parser.parse_args(argv)
    save_tokenizer(train_tokenizer(world_captions()), args.out)
    tokenizer = load_tokenizer(args.out)
    print(f"{args.out}: {len(tokenizer)} pieces")


if __name__ == "__main__":
    errors.run_main(main)

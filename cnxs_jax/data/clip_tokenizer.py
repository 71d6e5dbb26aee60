"""The tiny CLIP tokenizer of the embedded Stable Diffusion.

    python -m cnxs_jax.data.clip_tokenizer --out=cnxs_jax/assets/sd_tiny/tokenizer

writes `vocab.json`, `merges.txt` and `tokenizer_config.json` as CLIP has them (arXiv 2103.00020,
section 2.4), which `CLIPTokenizer` of transformers 4 and 5 reads: byte pairs in which each caption
word is one token and any other text falls back to bytes.
"""

import argparse
import collections
import pathlib
import re

from cnxs_jax import errors
from cnxs_jax.data import text
from cnxs_jax.storage import write_json, write_text

END = "</w>"  # marks the last symbol of a word
START_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"


def byte_symbols():
    """The character that stands for each of the 256 bytes, as GPT-2 has it: printable ones as they
    are, the others from code point 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]


def split(word, ranks):
    """The symbols of a word after all merges, the one of the lowest rank first."""
    parts = [*word[:-1], word[-1] + END]
    while True:
        pairs = set(zip(parts, parts[1:], strict=False)) & ranks.keys()
        if not pairs:
            return parts
        best = min(pairs, key=ranks.get)
        joined = []
        for part in parts:
            if joined and (joined[-1], part) == best:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined


def learn_merges(words):
    """`[(left, right), ...]` after which each of `words` is one symbol.

    A later merge does not disturb an earlier word: that one is whole by then.
    """
    ranks = {}
    for word in words:
        while len(parts := split(word, ranks)) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
    return list(ranks)


def train(captions):
    """`(vocabulary {token: id}, merges)`: bytes, bytes that end a word, merges, both specials.

    The most frequent words come first.
    """
    counts = collections.Counter(w for c in captions for w in re.findall("[a-z]+", c.lower()))
    if not counts:
        raise errors.DataError("no words", "clip_tokenizer.train", "give captions")
    merges = learn_merges(sorted(counts, key=lambda word: (-counts[word], word)))
    symbols = byte_symbols()
    tokens = [*symbols, *(s + END for s in symbols), *map("".join, merges), START_TEXT, END_TEXT]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def save(vocabulary, merges, directory, length=text.MAX_LENGTH):
    """Writes the three files; `length`: tokens that a text is padded or cut to."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "vocab.json", vocabulary, sort_keys=False)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_text(directory / "merges.txt", "\n".join(lines) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "bos_token": START_TEXT,
        **{name: END_TEXT for name in ("eos_token", "pad_token", "unk_token")},
    }
    write_json(directory / "tokenizer_config.json", config, sort_keys=False)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Makes the CLIP tokenizer of the scenes.")
    parser.add_argument("--out", required=True, help="directory to write")
    args = parser.parse_args(argv)
    save(*train(text.world_captions()), args.out)
    tokenizer = text.load_tokenizer(args.out)
    print(f"{args.out}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    errors.run_main(main)

"""A config's data: the loader, a few fixed examples to look at, tokens and the null caption."""

import jax
import numpy as np

from cnxs_jax import sharding
from cnxs_jax.data import buckets, caption_cleaning, features, pipeline, text
from cnxs_jax.errors import CheckpointError, ConfigError
from train import validate

KEYS = {
    "source": validate.choice(*pipeline.SOURCES),
    "split": validate.Optional(validate.text),
    "root": validate.Optional(validate.text),
    "size": validate.integer(8),
    "seed": validate.Optional(validate.integer(0)),
    "num_examples": validate.Optional(validate.integer(1)),
    "num_concepts": validate.Optional(validate.integer(1)),
    "relations": validate.Optional(validate.number(0, 1)),
    "tokenizer": validate.Optional(validate.text),
    "max_length": validate.Optional(validate.integer(1, 512)),
    "prefetch": validate.Optional(validate.integer(0)),
    "buckets": validate.Optional(validate.boolean),
}


def open_source(config, seed=None, truth=False):
    """The source of examples of `config.data`; `truth` adds masks, edges and depth."""
    data = config.data
    options = {k: data[k] for k in ("num_concepts", "relations") if data.get(k)}
    seed = data.get("seed") or 0 if seed is None else seed
    source = pipeline.open_source(
        data.source,
        data.get("split", "train"),
        data.size,
        truth=truth,
        seed=seed,
        root=data.get("root"),
        **options,
    )
    number = data.get("num_examples")
    return source if number in (None, len(source)) else pipeline.First(source, number)


def max_length(config):
    """Tokens of a text, for padding and truncation."""
    return config.data.get("max_length") or text.MAX_LENGTH


def open_loader(config, tokens=True, tokenizer_path=None, keys=("image",), encoded=False):
    """`(loader, tokenizer)`: this process's rows of the batches.

    No tokenizer without `tokens`, or where the source has its texts encoded (`data.features`).

    `keys` are the arrays of an example to stack, such as "edges"; `encoded` says that the task can
    read cached features in their place.
    """
    source = open_source(config, truth=tuple(keys) != ("image",))
    cached = isinstance(source, features.FeatureSource)
    if cached and not encoded:
        fix = "give it the data that the features were made of"
        raise ConfigError("this task reads pictures, not cached features", "data.source", fix)
    path = tokenizer_path or config.data.get("tokenizer")
    tokenizer = text.load_tokenizer(path) if tokens and not cached else None
    keys = source.keys if cached else keys
    options = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "rows": rows(config),
        "tokenizer": tokenizer,
        "tokenize": caption_cleaning.tokenize,
        "max_length": max_length(config),
    }
    if config.data.get("buckets"):
        if not hasattr(source, "original_sizes"):
            what = f"buckets need pictures of several shapes, not {config.data.source!r}"
            raise ConfigError(what, "data.buckets", 'set data.source = "image_folder"')
        bucket_keys = (*keys, *(() if cached else ("original_size",)))
        options |= {"keys": bucket_keys}
        return buckets.BucketLoader(source, config.data.size, **options), tokenizer
    prefetch = config.data.get("prefetch", 2)
    return pipeline.make_loader(source, prefetch=prefetch, keys=keys, **options), tokenizer


def rows(config):
    """What this process makes of each batch; one process alone makes all of it."""
    if jax.process_count() == 1:
        return None
    return sharding.batch_rows(sharding.make_mesh(config.mesh), config.batch_size)


def examples(config, number, keys=("image",)):
    """The first `number` examples of another seed than training's: {"caption", *keys}."""
    seed, truth = (config.data.get("seed") or 0) + 1, tuple(keys) != ("image",)
    source = open_source(config, seed=seed, truth=truth)
    found = [source[i % len(source)] for i in range(number)]
    stacked = {key: np.stack([e[key] for e in found]) for key in keys}
    return {**stacked, "caption": [e["caption"] for e in found]}


def tokens(config, tokenizer, captions):
    """{"input_ids", "attention_mask"} of captions."""
    ids, mask = caption_cleaning.tokenize(tokenizer, captions, max_length(config))
    return {"input_ids": ids, "attention_mask": mask}


def null_caption(directory):
    """PixArt's learned unconditional caption [L,D] of a pipeline directory."""
    from cnxs_jax.pipelines.load import load_null_caption

    found = load_null_caption(directory, "transformer")
    if found is None:
        raise CheckpointError(
            "the learned null caption is missing",
            directory,
            'convert the teacher from PixArt\'s own .pth, or set config.null = "empty_prompt"',
        )
    return found

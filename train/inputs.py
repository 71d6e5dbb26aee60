"""A config's data: the loader, a few fixed examples to look at, tokens and the null caption."""

import jax
import numpy as np

from cnxs_jax import sharding
from cnxs_jax.data import buckets, caption_cleaning, image_folder, pipeline, text
from cnxs_jax.errors import CheckpointError, ConfigError
from train import validate

KEYS = {
    "source": validate.choice(*pipeline.SOURCES),
    "split": validate.Optional(validate.text),
    "root": validate.Optional(validate.text),
    "size": validate.integer(8),
    "seed": validate.Optional(validate.integer(0)),
    "num_concepts": validate.Optional(validate.integer(1)),
    "tokenizer": validate.Optional(validate.text),
    "max_length": validate.Optional(validate.integer(1, 512)),
    "prefetch": validate.Optional(validate.integer(0)),
    "buckets": validate.Optional(validate.boolean),
}


def open_source(config, seed=None, truth=False):
    """The source of examples of `config.data`; `truth` adds masks, edges and depth."""
    data = config.data
    options = {"num_concepts": data.num_concepts} if data.get("num_concepts") else {}
    seed = data.get("seed", 0) if seed is None else seed
    return pipeline.open_source(
        data.source,
        data.get("split", "train"),
        data.size,
        truth=truth,
        seed=seed,
        root=data.get("root"),
        **options,
    )


def open_loader(config, tokens=True, tokenizer_path=None, keys=("image",)):
    """`(loader, tokenizer)`: this process's rows of the batches; no tokenizer without `tokens`.

    `keys` are the arrays of an example to stack, such as "edges".
    """
    path = tokenizer_path or config.data.get("tokenizer")
    tokenizer = text.load_tokenizer(path) if tokens else None
    source = open_source(config, truth=tuple(keys) != ("image",))
    options = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "rows": rows(config),
        "tokenizer": tokenizer,
        "tokenize": caption_cleaning.tokenize,
        "max_length": config.data.get("max_length", text.MAX_LENGTH),
    }
    if config.data.get("buckets"):
        if not isinstance(source, image_folder.ImageFolder):
            what = f"buckets need pictures of several shapes, not {config.data.source!r}"
            raise ConfigError(what, "data.buckets", 'set data.source = "image_folder"')
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
    seed, truth = config.data.get("seed", 0) + 1, tuple(keys) != ("image",)
    source = open_source(config, seed=seed, truth=truth)
    found = [source[i % len(source)] for i in range(number)]
    stacked = {key: np.stack([e[key] for e in found]) for key in keys}
    return {**stacked, "caption": [e["caption"] for e in found]}


def tokens(config, tokenizer, captions):
    """{"input_ids", "attention_mask"} of captions."""
    length = config.data.get("max_length", text.MAX_LENGTH)
    ids, mask = caption_cleaning.tokenize(tokenizer, captions, length)
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

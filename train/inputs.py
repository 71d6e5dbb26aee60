"""A config's data: the loader, a few fixed examples to look at, tokens and the null caption."""

import jax
import numpy as np

from cnxs_jax.data import buckets, image_folder, pipeline, text
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


def open_source(config, seed=None):
    """The source of examples of `config.data`."""
    data = config.data
    options = {"num_concepts": data.num_concepts} if data.get("num_concepts") else {}
    seed = data.get("seed", 0) if seed is None else seed
    return pipeline.open_source(
        data.source,
        data.get("split", "train"),
        data.size,
        seed=seed,
        root=data.get("root"),
        **options,
    )


def open_loader(config, tokens=True, tokenizer_path=None):
    """`(loader, tokenizer)`: this process's share of the batches; no tokenizer without `tokens`."""
    path = tokenizer_path or config.data.get("tokenizer")
    tokenizer = text.load_tokenizer(path) if tokens else None
    source = open_source(config)
    options = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "tokenizer": tokenizer,
        "max_length": config.data.get("max_length", text.MAX_LENGTH),
    }
    if config.data.get("buckets"):
        if not isinstance(source, image_folder.ImageFolder):
            what = f"buckets need pictures of several shapes, not {config.data.source!r}"
            raise ConfigError(what, "data.buckets", 'set data.source = "image_folder"')
        return buckets.BucketLoader(source, config.data.size, **options), tokenizer
    prefetch = config.data.get("prefetch", 2)
    return pipeline.make_loader(source, prefetch=prefetch, **options), tokenizer


def examples(config, number):
    """The first `number` examples of another seed than training's: {"image", "caption"}."""
    source = open_source(config, seed=config.data.get("seed", 0) + 1)
    found = [source[i % len(source)] for i in range(number)]
    return {
        "image": np.stack([e["image"] for e in found]),
        "caption": [e["caption"] for e in found],
    }


def tokens(config, tokenizer, captions):
    """{"input_ids", "attention_mask"} of captions."""
    length = config.data.get("max_length", text.MAX_LENGTH)
    ids, mask = text.tokenize(tokenizer, captions, length)
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

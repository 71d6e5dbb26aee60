"""A config's data: the loader, a few fixed examples to look at, tokens and the null caption.

With `data.hint` every example has a control picture, too (`Hinted`).
"""

import jax
import numpy as np

from cnxs_jax import sharding
from cnxs_jax.control import hints
from cnxs_jax.data import buckets, caption_cleaning, pipeline, text
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


# Of tasks that show a control picture; `hint_path` are the weights of a hint that has some.
HINT = {"hint": validate.choice(*hints.HINTS), "hint_path": validate.Optional(validate.text)}


SHOWN_PIXELS = 2**20


class Hinted:
    """A source whose examples have a control picture beside the image: `hint` uint8 [H,W,3].

    Canny's thresholds are drawn for each example from its index and the epoch, so that a resumed
    run sees the same. `[index]` is the example of the first epoch. `path` are the weights of a
    hint that a network draws.
    """

    varies = True  # from epoch to epoch: see `pipeline.example`

    def __init__(self, source, name, seed, path=None):
        self.source, self.name, self.seed, self.path = source, name, seed, path

    def __len__(self):
        return len(self.source)

    def __repr__(self):
        return f"Hinted({self.name}, {self.source!r})"

    def __getitem__(self, index):
        return self.at(index, 0)

    def at(self, index, epoch):
        """The example as it is in this epoch."""
        return self._with_hint(self.source[index], index, epoch)

    def __getattr__(self, name):
        """What else the source has: `original_sizes`, and `read`, which gives it a hint, too."""
        if name.startswith("__") or name == "source":  # before `__init__`, as in unpickling
            raise AttributeError(name)
        found = getattr(self.source, name)
        if name != "read":
            return found
        return lambda index, height, width, epoch=0: self._with_hint(
            found(index, height, width), index, epoch
        )

    def _with_hint(self, example, index, epoch):
        rng = np.random.default_rng([self.seed, int(index), epoch])
        return {**example, "hint": hints.picture(example, self.name, rng, self.path)}


def check_hint(data, where):
    """Raises ConfigError for a control picture that the source of `data` cannot have.

    And for weights that are missing, or given for a hint that no network draws.
    """
    name, source = data["hint"], data["source"]
    hint, path = hints.named(name), data.get("hint_path")
    if hint.source != "image" and source not in (*pipeline.WORLDS, "features"):
        what = f"{source} has no exact {name}, which only the scenes know"
        raise ConfigError(what, f"{where}.hint", 'set it to "canny", "hed" or "midas"')
    if path and hint.weights is None:
        raise ConfigError(f"{name} has no weights", f"{where}.hint_path", "leave it out")
    if not path and hint.weights is not None and hint.weights.PACKAGE is None:
        what = f"the hint {name!r} needs the weights of its network"
        raise ConfigError(what, f"{where}.hint_path", hint.weights.INSTALL)


def wants_truth(keys):
    """Whether these arrays of an example come from a scene's exact truth."""
    return not set(keys) <= {"image", "hint"}


def open_source(config, seed=None, truth=False):
    """The source of examples of `config.data`; `truth` adds masks, edges and depth.

    With `data.hint` examples have their control picture, which cached features hold already.
    """
    data = config.data
    options = {k: data[k] for k in ("num_concepts", "relations") if data.get(k)}
    seed = data.get("seed") or 0 if seed is None else seed
    hint = data.get("hint")
    truth = truth or (hint is not None and hints.named(hint).source != "image")
    source = pipeline.open_source(
        data.source,
        data.get("split", "train"),
        data.size,
        truth=truth,
        seed=seed,
        root=data.get("root"),
        **options,
    )
    if hint is not None and data.source != "features":
        source = Hinted(source, hint, seed, data.get("hint_path"))
    number = data.get("num_examples")
    return source if number in (None, len(source)) else pipeline.First(source, number)


def world(config):
    """The `scenes.World` that `config.data` shows, one of `pipeline.WORLDS`."""
    make_world, _ = pipeline.WORLDS[config.data.source]
    number = config.data.get("num_concepts")
    return make_world(num_concepts=number) if number else make_world()


def max_length(config):
    """Tokens of a text, for padding and truncation."""
    return config.data.get("max_length") or text.MAX_LENGTH


def open_loader(
    config,
    tokens=True,
    tokenizer_path=None,
    keys=("image",),
    encoded=False,
    tokenize=caption_cleaning.tokenize,
):
    """`(loader, tokenizer)`: this process's rows of the batches.

    No tokenizer without `tokens`, or where the source has its texts encoded (`data.features`).

    `keys` are the arrays of an example to stack, such as "edges"; `encoded` says that the task can
    read cached features in their place; `tokenize` treats texts as the task's pipeline does.
    """
    source = open_source(config, truth=wants_truth(keys))
    cached = config.data.source == "features"
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
        "tokenize": tokenize,
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
    seed = (config.data.get("seed") or 0) + 1
    source = open_source(config, seed=seed, truth=wants_truth(keys))
    found = [source[i % len(source)] for i in range(number)]
    stacked = {key: np.stack([e[key] for e in found]) for key in keys}
    return {**stacked, "caption": [e["caption"] for e in found]}


def shown(config, keys=("image",)):
    """The `examples` that a run draws as it goes: 16, fewer of large pictures.

    A megapixel at once: a VAE's decoder takes a gigabyte for it, beside the training's own.
    """
    number = max(SHOWN_PIXELS // config.data.size**2, 1)
    return examples(config, min(number, 16), keys)


def tokens(config, tokenizer, captions, tokenize=caption_cleaning.tokenize):
    """{"input_ids", "attention_mask"} of captions."""
    ids, mask = tokenize(tokenizer, captions, max_length(config))
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

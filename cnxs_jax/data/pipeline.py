"""Sources by name, and the grain loader: batches of numpy arrays, resumable to the sample.

The loader's whole state is the number of samples consumed over all processes, so a run may resume
with another number of processes, another batch size or other threads and still sees each sample
once and in the same order.
"""

import grain.python as grain
import numpy as np

from cnxs_jax import errors
from cnxs_jax.data import emoji_scenes, features, image_folder, scenes, shapes, text, tfds_source

WORLDS = {"emoji_scenes": (emoji_scenes.world, 64), "shapes": (shapes.world, 32)}
SOURCES = (*WORLDS, "image_folder", "features", *tfds_source.NAMES)


def open_source(name, split="train", size=None, *, truth=False, seed=0, root=None,
                relations=0.0, **world_options):  # fmt: skip
    """An indexable source of examples: `source[i] -> {"image", "caption", ...}`.

    Args:
        name: "emoji_scenes", "shapes", "image_folder", "features" (`data.features`), or a data set
            of `data.tfds_source`.
        split: "train", "test", "heldout_pairs" or "heldout_relations"; a folder has none.
        size: picture side, px; default 64 (shapes: 32, folders: 512).
        truth: also give masks, edges, depth.
        seed: another seed is another set of scenes.
        root: the folder of pictures, of cached features, or of prepared data sets.
        relations: of the two worlds; see `scenes.SceneSource`.
        world_options: e.g. `num_concepts`.

    Raises:
        errors.ConfigError: unknown name or split, or no root.
        errors.DataError: what is wrong with a folder.
    """
    if name not in SOURCES:
        fix = f"use one of {tuple(SOURCES)}" + errors.did_you_mean(name, SOURCES)
        raise errors.ConfigError(f"unknown source {name!r}", "data.source", fix)
    if name not in WORLDS:
        if relations:
            raise errors.ConfigError(f"{name} knows no relations", "data.relations", "leave it out")
        if not root:
            fix = "e.g. --config.data.root=photos"
            raise errors.ConfigError(f"{name} needs a folder", "data.root", fix)
        if name == "features":
            return features.FeatureSource(root)
        if name == "image_folder":
            return image_folder.ImageFolder(root, size or 512)
        return tfds_source.TfdsSource(name, split, size or 512, root)
    if "num_concepts" in world_options and name != "emoji_scenes":
        raise errors.ConfigError(f"{name} has no number of concepts", "data.num_concepts")
    world, usual = WORLDS[name]
    return scenes.SceneSource(
        world(**world_options), split, size or usual, truth, seed, relations=relations
    )


class First:
    """The first `number` examples of a source. Raises ConfigError where it has fewer.

    What else a source can do, such as `read`, it can, too.
    """

    def __init__(self, source, number):
        if number > len(source):
            what = f"{number} examples of {len(source)}"
            raise errors.ConfigError(what, "data.num_examples", f"use at most {len(source)}")
        self.source, self.number = source, number

    def __len__(self):
        return self.number

    def __repr__(self):
        return f"First({self.number} of {self.source!r})"

    def __getitem__(self, index):
        return self.source[index]

    def __getattr__(self, name):
        if name.startswith("__") or name == "source":  # before `__init__`, as in unpickling
            raise AttributeError(name)
        found = getattr(self.source, name)
        return (lambda: found()[: self.number]) if name == "original_sizes" else found


def example(source, index, epoch, *size):
    """Example `index` of a source, in (height, width) `size` where one is given.

    A source that `varies` makes another example in each epoch: `at(index, epoch)` and
    `read(index, height, width, epoch)`.
    """
    varies = getattr(source, "varies", False)
    if size:
        return source.read(index, *size, epoch) if varies else source.read(index, *size)
    return source.at(index, epoch) if varies else source[index]


class _Batches:
    """Batch `k` of one process: its rows of the global samples `[start + k·B, start + (k+1)·B)`.

    Interleaving by batch, not by process, keeps the global order independent of their number.
    """

    def __init__(self, start, loader):
        self.start, self.loader = start, loader

    def __len__(self):
        return (len(self.loader.order) - self.start) // self.loader.batch_size

    def __getitem__(self, k):
        first = self.start + int(k) * self.loader.batch_size
        return self.loader.collate([self.loader.sample(first + row) for row in self.loader.rows])


class Loader:
    """An iterator over batches with `get_state` and `set_state`; made by `make_loader`."""

    def __init__(self, source, *, batch_size, seed, shuffle, rows, tokenizer, max_length, tokenize,
                 keys, prefetch):  # fmt: skip
        self.source, self.seed, self.shuffle = source, seed, shuffle
        self.batch_size, self.keys, self.prefetch = batch_size, tuple(keys), prefetch
        self.rows = check_rows(rows, batch_size)
        self.tokenizer, self.max_length, self.tokenize = tokenizer, max_length, tokenize
        order = grain.MapDataset.source(range(len(source))).seed(seed)
        if shuffle:
            order = order.shuffle()
        self.order = order.repeat()  # of the source's indices, shuffled anew in every epoch
        self._start_at(0)

    def _start_at(self, sample):
        self.position = sample
        batches = grain.MapDataset.source(_Batches(sample, self))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self.prefetch)
        if not self.prefetch:
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._batches = iter(batches.to_iter_dataset(options))

    def sample(self, number):
        """Example `number` of the endless stream; its epoch follows from the number."""
        return example(self.source, int(self.order[number]), number // len(self.source))

    def collate(self, examples):
        """Stacks examples into `{"image", "caption", ...}`; tokens where there is a tokenizer."""
        batch = {key: np.stack([e[key] for e in examples]) for key in self.keys}
        batch["caption"] = [e["caption"] for e in examples]
        if self.tokenizer is not None:
            batch["input_ids"], batch["attention_mask"] = self.tokenize(
                self.tokenizer, batch["caption"], self.max_length
            )
        return batch

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._batches)
        self.position += self.batch_size
        return batch

    def get_state(self):
        """`{"next_sample", "seed", "shuffle", "source"}`: JSON-able, the same on every process."""
        return {
            "next_sample": self.position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "source": repr(self.source),
        }

    def set_state(self, state):
        """Goes to a saved state. Raises DataError where it was saved by a different stream."""
        mine = self.get_state()
        missing = set(mine) - set(state)
        if missing:
            fix = "use the state of a checkpoint of this library"
            raise errors.DataError(f"state lacks {sorted(missing)}", "data iterator state", fix)
        changed = {k: (state[k], mine[k]) for k in mine if k != "next_sample"}
        changed = {k: v for k, v in changed.items() if v[0] != v[1]}
        if changed:
            text_ = ", ".join(f"{k}: saved {a!r}, now {b!r}" for k, (a, b) in changed.items())
            fix = "resume with the saved data configuration, or start a new workdir"
            raise errors.DataError(f"another data stream ({text_})", "data iterator state", fix)
        self._start_at(int(state["next_sample"]))


def check_rows(rows, batch_size):
    """The rows of a batch that a loader makes, all unless given; ConfigError for none or others."""
    if batch_size < 1:
        raise errors.ConfigError(f"batch_size {batch_size}", "data.batch_size", "use at least 1")
    rows = tuple(range(batch_size) if rows is None else rows)
    if not rows or not all(0 <= row < batch_size for row in rows):
        what = f"rows {rows} of a batch of {batch_size}"
        raise errors.ConfigError(what, "rows", "use `sharding.batch_rows`")
    return rows


def make_loader(source, *, batch_size, seed=0, shuffle=True, rows=None, tokenizer=None,
                max_length=24, tokenize=text.tokenize, start_state=None, keys=("image",),
                prefetch=2):  # fmt: skip
    """An endless, checkpointable iterator over batches.

    Args:
        source: anything with `len` and `[i] -> {"caption", *keys}`.
        batch_size: samples of one step over all processes.
        seed, shuffle: of the global order; the order does not depend on the processes.
        rows: of each batch, what this process makes (`sharding.batch_rows`); all unless given.
        tokenizer: from `text.load_tokenizer`; None: captions only.
        max_length: tokens, for padding and truncation.
        tokenize: `(tokenizer, captions, max_length) -> (ids, mask)`.
        start_state: a `get_state()` to go on from.
        keys: the arrays to stack, e.g. `("image", "edges")`.
        prefetch: batches made ahead in one background thread; 0: none.

    Returns:
        An iterator of dicts: the stacked `keys` (`image` uint8 [B,H,W,3]), `caption` list of B
        str, and with a tokenizer `input_ids`, `attention_mask` int32 [B,L]; B = len(rows).

    Raises:
        errors.ConfigError: batch size and rows do not fit.
        errors.DataError: `start_state` belongs to another stream.
    """
    loader = Loader(
        source, batch_size=batch_size, seed=seed, shuffle=shuffle, rows=rows, tokenizer=tokenizer,
        max_length=max_length, tokenize=tokenize, keys=keys, prefetch=prefetch,
    )  # fmt: skip
    if start_state is not None:
        loader.set_state(start_state)
    return loader

"""Aspect-ratio buckets: every batch has one shape, no picture is squeezed and none is lost.

PixArt-alpha (arXiv 2310.00426, section 2.4) trains its last stage on 40 shapes of nearly the same
area. A step is compiled once a shape. Pictures that do not fill a batch at the end of an epoch
wait for the next one.
"""

import numpy as np

from cnxs_jax.data import pipeline, text
from cnxs_jax.errors import ConfigError, DataError

# Height and width in 1/16 of the base side, from wide to tall: PixArt-alpha's training table.
_WIDE = (
    *((8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23)),
    *((11, 22), (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17)),
    (15, 16),
)
_TALL = (
    *((16, 16), (16, 15), (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12)),
    *((22, 11), (23, 11), (24, 10), (25, 10), (26, 9), (27, 9), (28, 9), (29, 8), (30, 8), (31, 8)),
    (32, 8),
)
SHAPES = (*_WIDE, *_TALL)


def table(base):
    """{ratio (height / width, two decimals): (height, width) px}, 40 of them, for a base side.

    Raises ConfigError unless the sides are multiples of 16 px (VAE and patches of 2).
    """
    if base % 256:
        low = max(base // 256, 1) * 256
        fix = f"use {low} or {low + 256}"
        raise ConfigError(f"buckets need a side that is a multiple of 256, got {base}",
                          "data.size", fix)  # fmt: skip
    unit = base // 16
    return {round(h / w, 2): (h * unit, w * unit) for h, w in SHAPES}


def assign(original_sizes, ratios):
    """Index into `ratios` (rising or not) of the nearest height / width, for sizes [N, 2]."""
    wanted = original_sizes[:, 0] / original_sizes[:, 1]
    return np.abs(wanted[:, None] - np.asarray(ratios)[None]).argmin(axis=1)


class BucketLoader:
    """An endless iterator over batches of one bucket each, with `get_state` and `set_state`.

    The order is that of a shuffled epoch: a batch comes when its bucket has enough pictures. It
    does not depend on the processes; each takes its rows of every batch.

    Args:
        folder: a source with `original_sizes()` and `read(index, height, width)`, such as
            `image_folder.ImageFolder`; its own size does not matter.
        base: side of the square bucket, px.
        batch_size: over all processes.
        seed: of the order.
        rows, tokenizer, max_length, tokenize: as `pipeline.make_loader`.
        keys: the arrays of an example to stack.

    A batch: `image` uint8 [B,H,W,3], `original_size` int32 [B,2] (height, width), `aspect` float32
    [B,1] (the bucket's ratio), `caption`, and with a tokenizer `input_ids`, `attention_mask`.
    """

    def __init__(
        self,
        folder,
        base,
        *,
        batch_size,
        seed=0,
        rows=None,
        tokenizer=None,
        max_length=24,
        tokenize=text.tokenize,
        keys=("image", "original_size"),
    ):
        buckets = table(base)
        self.ratios, self.shapes = tuple(buckets), tuple(buckets.values())
        self.bucket_of = assign(folder.original_sizes(), self.ratios)
        self.source, self.keys = folder, tuple(keys)
        self.batch_size, self.seed = batch_size, seed
        self.rows = pipeline.check_rows(rows, batch_size)
        self.tokenizer, self.max_length, self.tokenize = tokenizer, max_length, tokenize
        self._go_to(epoch=0, position=0, waiting={})

    def _go_to(self, epoch, position, waiting):
        self.epoch, self.position = epoch, position
        self.waiting = {int(bucket): list(indices) for bucket, indices in waiting.items()}
        self.order = self._shuffled(epoch)
        self.rank = np.argsort(self.order)  # where in the order each index comes

    def _shuffled(self, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.source))

    def _next_indices(self):
        """(bucket, indices) of the next full batch."""
        while True:
            if self.position == len(self.order):
                self._go_to(self.epoch + 1, 0, self.waiting)
            index = int(self.order[self.position])
            self.position += 1
            bucket = int(self.bucket_of[index])
            queue = self.waiting.setdefault(bucket, [])
            queue.append(index)
            if len(queue) == self.batch_size:
                del self.waiting[bucket]
                return bucket, queue

    def _epochs(self, indices):
        """The epoch in which each was drawn: pictures may have waited from earlier ones.

        Every epoch draws each index once, so an index that waited twice was drawn an epoch apart.
        """
        found, later = [], {}
        for index in reversed(indices):
            last = self.epoch if self.rank[index] < self.position else self.epoch - 1
            found.append(last - later.get(index, 0))
            later[index] = later.get(index, 0) + 1
        return found[::-1]

    def __iter__(self):
        return self

    def __next__(self):
        bucket, indices = self._next_indices()
        epochs, shape = self._epochs(indices), self.shapes[bucket]
        examples = [
            pipeline.example(self.source, indices[row], epochs[row], *shape) for row in self.rows
        ]
        batch = {key: np.stack([e[key] for e in examples]) for key in self.keys}
        batch.setdefault("aspect", np.full((len(examples), 1), self.ratios[bucket], np.float32))
        batch["caption"] = [e["caption"] for e in examples]
        if self.tokenizer is not None:
            batch["input_ids"], batch["attention_mask"] = self.tokenize(
                self.tokenizer, batch["caption"], self.max_length
            )
        return batch

    def get_state(self):
        """JSON-able, the same on every process: place in the order and the pictures that wait."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "waiting": {str(bucket): list(queue) for bucket, queue in sorted(self.waiting.items())},
            "seed": self.seed,
            "batch_size": self.batch_size,
            "source": repr(self.source),
        }

    def set_state(self, state):
        """Goes to a saved state. Raises DataError where it was saved by a different stream."""
        mine = self.get_state()
        for key in ("seed", "batch_size", "source"):
            if state.get(key) != mine[key]:
                what = f"another data stream ({key}: saved {state.get(key)!r}, now {mine[key]!r})"
                fix = "resume with the saved data configuration, or start a new workdir"
                raise DataError(what, "data iterator state", fix)
        self._go_to(state["epoch"], state["position"], state["waiting"])

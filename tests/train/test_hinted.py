"""Canny in training: other thresholds for each picture and epoch, the same after a resume."""

import itertools

import numpy as np
import pytest

from cnxs_jax.data import buckets, pipeline
from train import inputs


def picture():
    """Squares with gradients of 204 to 330 at their corners, where the upper threshold is drawn."""
    found = np.zeros((8, 64, 3), np.uint8)
    for i in range(8):
        found[2:6, 8 * i + 2 : 8 * i + 6] = 34 + 3 * i
    return found


class Pictures:
    """`number` times the same picture, in one shape of the buckets or the other by turns."""

    def __init__(self, number, ratios=(1.0, 2.0)):
        self.number, self.ratios = number, ratios

    def __len__(self):
        return self.number

    def __repr__(self):
        return f"Pictures({self.number})"

    def __getitem__(self, index):
        return {"image": picture(), "caption": str(index)}

    def read(self, index, height, width):
        return {**self[index], "original_size": np.array([height, width])}

    def original_sizes(self):
        ratios = [self.ratios[i % len(self.ratios)] for i in range(self.number)]
        return np.array([(256 * ratio, 256) for ratio in ratios])


def hinted(number=8, seed=0, **options):
    return inputs.Hinted(Pictures(number, **options), "canny", seed)


def seen(batches):
    """[(caption, hint)] in order."""
    rows = [zip(b["caption"], b["hint"], strict=True) for b in batches]
    return [(caption, hint.tobytes()) for batch in rows for caption, hint in batch]


def by_caption(pairs):
    found = {}
    for caption, hint in pairs:
        found.setdefault(caption, []).append(hint)
    return found


def test_cannys_thresholds_differ_between_examples():
    """Of one picture under many numbers: other thresholds leave other squares of it."""
    source = hinted()
    found = {source[i]["hint"].tobytes() for i in range(8)}
    assert len(found) > 2
    again = hinted(seed=1)
    assert {again[i]["hint"].tobytes() for i in range(8)} != found


@pytest.mark.parametrize("first", [None, 6])
def test_cannys_thresholds_differ_between_epochs(first):
    """And a loader that goes on from a state makes the same; so do processes side by side."""
    source = hinted() if first is None else pipeline.First(hinted(), first)
    options = {"batch_size": 4, "seed": 3, "keys": ("image", "hint"), "prefetch": 0}
    loader = pipeline.make_loader(source, **options)
    whole = seen(itertools.islice(loader, 12))
    for hints in by_caption(whole).values():
        assert len(hints) >= 6
        assert len(set(hints)) > 2
    start = loader.get_state() | {"next_sample": 16}
    resumed = pipeline.make_loader(source, **options, start_state=start)
    assert seen(itertools.islice(resumed, 8)) == whole[16:]
    half = pipeline.make_loader(source, **options, rows=(2, 3))
    expected = [pair for n, pair in enumerate(whole) if n % 4 > 1]
    assert seen(itertools.islice(half, 12)) == expected
    assert {c: hints[0] for c, hints in by_caption(whole).items()} == {
        source[i]["caption"]: source[i]["hint"].tobytes() for i in range(len(source))
    }


def test_a_picture_that_waits_for_its_bucket_keeps_its_epoch():
    """11 pictures of two shapes, batches of 4: some wait for the next epoch, and come in it again.

    In batches of 16 each picture of a shape is even there twice and more.
    """
    for batch_size, steps in ((4, 24), (16, 6)):
        source = hinted(11)
        options = {"batch_size": batch_size, "keys": ("image", "hint")}
        loader = buckets.BucketLoader(source, 256, **options)
        batches, states = [], []
        for _ in range(steps):
            states.append(loader.get_state())
            batches.append(next(loader))
        for caption, hints in by_caption(seen(batches)).items():
            expected = [source.at(int(caption), epoch)["hint"].tobytes() for epoch in range(99)]
            assert hints == expected[: len(hints)]
        again = buckets.BucketLoader(source, 256, **options)
        again.set_state(states[2])
        assert seen(itertools.islice(again, steps - 2)) == seen(batches[2:])

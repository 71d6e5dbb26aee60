"""The loader: resume at every step, any number of processes, and the TFDS builder."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from cnxs_jax import errors
from cnxs_jax.data import pipeline

SOURCE = pipeline.open_source("shapes")


def take(loader, count):
    return list(itertools.islice(loader, count))


def loader(**kwargs):
    return pipeline.make_loader(SOURCE, **{"batch_size": 4, "seed": 3, **kwargs})


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(batch["image"], other["image"])
        assert batch["caption"] == other["caption"]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_at_every_step_equals_the_uninterrupted_tail(prefetch):
    whole = take(loader(prefetch=prefetch), 8)
    for step in range(8):
        running = loader(prefetch=prefetch)
        take(running, step)
        state = json.loads(json.dumps(running.get_state()))
        assert state["next_sample"] == 4 * step
        assert_same(take(loader(prefetch=prefetch, start_state=state), 8 - step), whole[step:])
        running.set_state(state)
        assert_same(take(running, 8 - step), whole[step:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_see_what_one_sees(processes):
    whole = take(loader(), 5)
    shares = np.split(np.arange(4), processes)
    parts = [take(loader(rows=share), 5) for share in shares]
    for step in range(5):
        images = np.concatenate([p[step]["image"] for p in parts])
        np.testing.assert_array_equal(images, whole[step]["image"])


def test_resume_with_other_processes_and_batch_size():
    flat = [c for b in take(loader(), 12) for c in b["caption"]]
    first = loader(rows=(2, 3))
    take(first, 3)
    state = first.get_state()
    rest = take(loader(batch_size=6, start_state=state), 4)
    assert [c for b in rest for c in b["caption"]] == flat[12:36]


def test_order_depends_on_seed_and_epochs_differ():
    source = pipeline.scenes.SceneSource(SOURCE.world, size=32, length=8)
    loaders = [pipeline.make_loader(source, batch_size=8, seed=s) for s in (0, 1)]
    epochs = [[tuple(b["caption"]) for b in take(x, 2)] for x in loaders]
    assert epochs[0][0] != epochs[0][1]
    assert epochs[0][0] != epochs[1][0]
    assert {frozenset(e) for pair in epochs for e in pair} == {frozenset(epochs[0][0])}
    plain = pipeline.make_loader(source, batch_size=8, shuffle=False)
    assert next(plain)["caption"] == [source[i]["caption"] for i in range(8)]


def test_extra_keys_are_stacked():
    source = pipeline.open_source("shapes", truth=True)
    batch = next(pipeline.make_loader(source, batch_size=3, keys=("image", "edges", "depth")))
    assert batch["image"].shape == (3, 32, 32, 3)
    assert batch["edges"].shape == batch["depth"].shape == (3, 32, 32)


def test_a_state_of_another_stream_is_refused():
    state = loader().get_state()
    with pytest.raises(errors.DataError, match="seed: saved 3, now 4"):
        loader(seed=4, start_state=state)
    other = pipeline.make_loader(pipeline.open_source("emoji_scenes"), batch_size=4, seed=3)
    with pytest.raises(errors.DataError, match="source: saved"):
        other.set_state(state)
    with pytest.raises(errors.DataError, match="lacks"):
        loader(start_state={"next_index": 3})


@pytest.mark.parametrize(
    "kwargs",
    [{"batch_size": 0}, {"rows": ()}, {"rows": (3, 4)}, {"rows": (-1,)}],
)
def test_bad_loader_arguments(kwargs):
    with pytest.raises(errors.ConfigError):
        loader(**kwargs)


def test_unknown_source():
    with pytest.raises(errors.ConfigError, match='Did you mean "emoji_scenes"'):
        pipeline.open_source("emoji_scene")


TFDS = """
import json, sys
import numpy as np
from cnxs_jax.data import pipeline
from cnxs_jax.data.emoji_scenes import EmojiScenes
builder = EmojiScenes(data_dir=sys.argv[1], config="tiny", file_format="array_record")
builder.download_and_prepare()
made = pipeline.open_source("emoji_scenes", truth=True)
wanted = {made[i]["image"].tobytes(): made[i] for i in range(32)}
read = builder.as_data_source("train")
assert len(read) == 32
for example in read:
    scene = wanted.pop(example["image"].tobytes())
    assert example["caption"].decode() == scene["caption"]
    for key in ("masks", "edges", "depth"):
        np.testing.assert_array_equal(example[key], scene[key])
    facts = json.loads(example["facts"])
    assert facts["prompt"]["concepts"] == scene["prompt"]["concepts"]
assert not wanted
assert len(builder.as_data_source("heldout_pairs")) == 8
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
print("read back")
"""


def test_tfds_builds_and_reads_without_tensorflow(tmp_path):
    command = [sys.executable, "-c", TFDS, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip().endswith("read back")


def test_loader_needs_neither_torch_nor_tensorflow_nor_tfds():
    code = (
        "import sys; from cnxs_jax.data import pipeline as p;"
        "next(p.make_loader(p.open_source('emoji_scenes'), batch_size=2));"
        "print([m for m in ('torch', 'tensorflow', 'transformers', 'tensorflow_datasets')"
        " if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

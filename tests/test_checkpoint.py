"""Checkpoints: exact round trips, other meshes, damage of every kind, refusals."""

import errno
import functools
import itertools
import json
import pathlib
import random
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from cnxs_jax import checkpoint, fingerprint, sharding
from cnxs_jax.errors import CheckpointError, NumericsError
from cnxs_jax.models.dit import PixArt
from tests import checks
from train.step import init_state

META = {"config": {"steps": 9}}


def make_state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "kernel": jax.random.normal(keys[0], (128, 96)),
        "half": jax.random.normal(keys[1], (8, 6)).astype(jnp.bfloat16),
        "count": jnp.int32(seed),
        "flag": jnp.array([True, False]),
        "nested": (jax.random.normal(keys[2], (5,)), {"scale": jnp.ones(())}),
    }


def abstract(state, where=None):
    place = where or (lambda x: x.sharding)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def write(directory, steps=(1, 2), make=make_state):
    with checkpoint.Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(step, make(step), {"next": step}, META)


def read(directory, like=None):
    with checkpoint.Checkpoints(directory, resume=True) as checkpoints:
        return checkpoints.restore(abstract(like or make_state()))


def arrays_of(directory, step):
    files = [p for p in (directory / str(step) / "state").rglob("d/*") if p.is_file()]
    assert files
    return files


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_round_trip_is_exact(tmp_path):
    write(tmp_path)
    state, data, meta = read(tmp_path)
    assert_same(state, make_state(2))
    assert data == {"next": 2}
    assert meta["config"] == META["config"]
    assert set(meta) == {"code", "config", "fingerprint"}


def test_fingerprint_is_the_same_on_every_mesh():
    state = make_state()
    prints = fingerprint.fingerprint(state)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    rules = ((r"kernel", ("data", "fsdp")), (r"half", ("fsdp", "data")))
    placed = jax.device_put(state, sharding.shardings(state, mesh, rules))
    assert not placed["kernel"].sharding.is_fully_replicated
    assert fingerprint.fingerprint(placed) == prints
    assert len({p[2] for p in prints.values()}) == len(prints)


def test_fingerprint_sees_swaps_transpositions_and_single_bits():
    x = jax.random.normal(jax.random.key(0), (6, 6))
    base = fingerprint.fingerprint({"x": x})["x"]
    swapped = x.at[0, 0].set(x[5, 1]).at[5, 1].set(x[0, 0])
    assert fingerprint.fingerprint({"x": swapped})["x"] != base
    assert fingerprint.fingerprint({"x": x.T})["x"] != base
    words = np.asarray(x).view(np.uint32)
    for bit in range(0, 32, 3):
        for place in range(36):
            flipped = words.copy()
            flipped.flat[place] ^= np.uint32(1 << bit)
            lanes = fingerprint._digest(jnp.asarray(flipped.view(np.float32)))
            assert f"{lanes[0]:08x}{lanes[1]:08x}" != base[2]


def test_restore_on_another_mesh(tmp_path):
    write(tmp_path)
    mesh = sharding.make_mesh({"fsdp": 8})
    rules = ((r"kernel", ("fsdp", None)),)
    placed = sharding.shardings(make_state(), mesh, rules)
    with checkpoint.Checkpoints(tmp_path, resume=True) as checkpoints:
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), make_state(), placed
        )
        state, _, _ = checkpoints.restore(wanted)
    assert not state["kernel"].sharding.is_fully_replicated
    assert_same(state, make_state(2))


@functools.cache
def dit_state(seed, devices):
    """The train state of a DiT with moments and EMA, all random, sharded where there are eight."""
    dit = PixArt(num_layers=2, num_attention_heads=2, attention_head_dim=32, sample_size=8,
                 cross_attention_dim=64, caption_channels=16)  # fmt: skip
    cond = {"text": jnp.zeros((1, 4, 16)), "text_mask": jnp.ones((1, 4), jnp.int32)}

    def init(key):
        params = dit.init(key, jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), cond)["params"]
        return init_state(params, optax.adamw(1e-3))

    shapes, rng = jax.eval_shape(init, jax.random.key(0)), np.random.default_rng(seed)
    spec = {"data": 2, "fsdp": 2, "tensor": 2} if devices == 8 else {"data": 1}
    mesh = sharding.make_mesh(spec, jax.devices()[:devices])
    return jax.tree.map(
        lambda x, where: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), where),
        shapes,
        sharding.shardings(shapes, mesh, auto_bytes=2**10),
    )


def check_flips(tmp_path, capsys, number, seed, devices):
    """Every flip in the newest step's arrays is detected, or had no effect on any value."""
    make = functools.partial(dit_state, devices=devices)
    split = [x for x in jax.tree.leaves(make(1)) if not x.sharding.is_fully_replicated]
    assert bool(split) == (devices == 8)
    write(tmp_path / "good", make=make)
    rng, harmless = random.Random(seed), 0
    for trial in range(number):
        directory = tmp_path / f"flip{trial}"
        shutil.copytree(tmp_path / "good", directory)
        files = arrays_of(directory, 2)
        path = rng.choices(files, [p.stat().st_size for p in files])[0]
        flip(path, rng.randrange(8 * path.stat().st_size))
        state, data, _ = read(directory, make(1))
        err = capsys.readouterr().err
        if "IS DAMAGED" in err:
            assert data == {"next": 1}
            assert_same(state, make(1))
            assert (directory / "2.corrupt").is_dir()
            assert not (directory / "2").exists()
        else:
            harmless += 1  # a byte that no array uses
            assert_same(state, make(2))
        shutil.rmtree(directory)
    # array bytes dominate the files, or the flips say little; ten flips may be unlucky
    assert harmless <= max(number * 0.1, 3)
    return harmless


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_flipped_bits_are_detected(tmp_path, capsys, devices):
    check_flips(tmp_path, capsys, 10, seed=1, devices=devices)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_thousand_flipped_bits_are_detected(tmp_path, capsys, devices):
    harmless = check_flips(tmp_path, capsys, 1000, seed=2, devices=devices)
    checks.record("bit flips in checkpoints", flips=1000, devices=devices,
                  detected=1000 - harmless, in_bytes_no_array_uses=harmless,
                  restored_wrong=0)  # fmt: skip


def damage_truncate(step):
    path = max(step.rglob("d/*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_delete(step):
    max(step.rglob("d/*"), key=lambda p: p.stat().st_size).unlink()


def damage_empty(step):
    shutil.rmtree(step)
    step.mkdir()


def damage_metadata(step):
    (step / "state" / "_METADATA").write_bytes(b"")


def damage_position(step):
    path = step / "data" / "metadata"
    path.write_text(json.dumps({"data": {"next": 7}}))


def damage_seal(step):
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"steps": 9', '"steps": 8'))


DAMAGES = (
    damage_truncate,
    damage_delete,
    damage_empty,
    damage_metadata,
    damage_position,
    damage_seal,
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_loudly(damage, tmp_path, capsys):
    write(tmp_path)
    before = [p.read_bytes() for p in sorted((tmp_path / "2").rglob("*")) if p.is_file()]
    damage(tmp_path / "2")
    assert before != [p.read_bytes() for p in sorted((tmp_path / "2").rglob("*")) if p.is_file()]
    state, data, _ = read(tmp_path)
    assert data == {"next": 1}
    assert_same(state, make_state(1))
    assert "CHECKPOINT 2 IS DAMAGED" in capsys.readouterr().err
    assert (tmp_path / "2.corrupt").is_dir()


def test_when_every_step_is_damaged_it_says_so(tmp_path):
    write(tmp_path)
    for step in (1, 2):
        damage_truncate(tmp_path / str(step))
    with pytest.raises(CheckpointError, match="none of the 2 steps"):
        read(tmp_path)


MACHINE = (
    MemoryError(),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    PermissionError(errno.EACCES, "Permission denied"),
    TimeoutError("the file system does not answer"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
    ValueError("UNAVAILABLE: Error reading d/0: connection reset"),
    ValueError("Error reading d/0 [OS error 24: EMFILE Too many open files]"),
)


def refuse(error, number):
    """A manager's `restore` that raises from its call `number` on."""
    restore, calls = ocp.CheckpointManager.restore, []

    def restored(self, *args, **kwargs):
        calls.append(args)
        if len(calls) < number:
            return restore(self, *args, **kwargs)
        try:
            raise error
        finally:
            calls.clear()

    return restored


def test_a_machine_that_cannot_read_renames_nothing(tmp_path, monkeypatch, capsys):
    """Call 1 reads the small files, call 2 the arrays."""
    write(tmp_path)
    for error, number in itertools.product(MACHINE, (1, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "restore", refuse(error, number))
            with pytest.raises(CheckpointError, match="cannot read") as caught:
                read(tmp_path)
        assert type(error).__name__ in caught.value.what
        assert "DAMAGED" not in capsys.readouterr().err
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    assert read(tmp_path)[1] == {"next": 2}


def test_an_error_wrapped_in_another_still_blames_the_machine():
    def wrapped(cause):
        try:
            try:
                raise cause
            except Exception as error:
                raise ValueError("restore failed") from error
        except ValueError as error:
            return checkpoint._blames_files(error)

    assert not wrapped(MemoryError())
    assert wrapped(FileNotFoundError(errno.ENOENT, "gone"))


def test_files_that_cannot_be_opened_are_left_alone(tmp_path):
    """A real refusal of the file system (ELOOP), through TensorStore and Orbax."""
    write(tmp_path)
    path = max((tmp_path / "2").rglob("d/*"), key=lambda p: p.stat().st_size)
    kept = path.rename(tmp_path.with_name("kept"))
    path.symlink_to(path)
    with pytest.raises(CheckpointError, match="cannot read: ValueError"):
        read(tmp_path)
    path.unlink()
    kept.rename(path)
    assert_same(read(tmp_path)[0], make_state(2))


def test_training_goes_on_after_a_fallback(tmp_path):
    """The step that was set aside can be saved again."""
    write(tmp_path)
    damage_delete(tmp_path / "2")
    with checkpoint.Checkpoints(tmp_path, resume=True) as checkpoints:
        checkpoints.restore(abstract(make_state()))
        checkpoints.save(2, make_state(5), {"next": 2}, META)
    assert_same(read(tmp_path)[0], make_state(5))


def test_another_model_is_an_error_and_not_damage(tmp_path):
    write(tmp_path)
    other = {**make_state(), "kernel": jnp.zeros((128, 97)), "new": jnp.zeros(2)}
    with pytest.raises(CheckpointError, match=r"1 arrays missing \['new'\].*1 of another shape"):
        read(tmp_path, other)
    assert checkpoint.saved_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_non_finite_state_is_not_saved(bad, tmp_path):
    write(tmp_path)
    state = make_state(3)
    state["kernel"] = state["kernel"].at[3, 3].set(bad)
    with (
        checkpoint.Checkpoints(tmp_path, resume=True) as checkpoints,
        pytest.raises(NumericsError, match="kernel"),
    ):
        checkpoints.save(3, state, None, META)
    assert checkpoint.saved_steps(tmp_path) == [1, 2]


def test_a_used_directory_is_refused_without_resume(tmp_path):
    write(tmp_path, (3, 7))
    with pytest.raises(CheckpointError, match=r"contains steps 3\.\.7"):
        checkpoint.Checkpoints(tmp_path)


def test_an_older_step_is_refused_and_not_lost(tmp_path):
    write(tmp_path, (5,))
    with (
        checkpoint.Checkpoints(tmp_path, resume=True) as checkpoints,
        pytest.raises(CheckpointError, match="step 4 was not saved"),
    ):
        checkpoints.save(4, make_state(4), None, META)


def test_opening_leaves_no_thread_behind_a_mistake(tmp_path):
    """Orbax cleans up in a thread, which printed a traceback after the message of a mistake."""
    before = set(threading.enumerate())
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with checkpoint.Checkpoints(tmp_path, resume=True):
        assert set(threading.enumerate()) == before


def test_old_steps_and_leftovers_are_cleared(tmp_path):
    write(tmp_path, (1, 2, 3, 4))
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    assert read(tmp_path)[1] == {"next": 4}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


def test_lock_admits_one_process(tmp_path):
    with (
        checkpoint.lock(tmp_path),
        pytest.raises(CheckpointError, match="another process"),
        checkpoint.lock(tmp_path),
    ):
        pass
    with checkpoint.lock(tmp_path):
        pass


def test_lock_refuses_what_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot write"),
        checkpoint.lock(pathlib.Path(tmp_path / "file" / "run")),
    ):
        pass

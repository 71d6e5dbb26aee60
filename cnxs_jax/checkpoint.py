"""Checkpoints of a training run; the only file that knows Orbax.

A step holds `{state, data, meta}` committed together: the train state, the data iterator's
position, and the configuration with a fingerprint of every array. Orbax does not checksum array
data (a flipped bit on disk is restored as a silently wrong number), so the fingerprint is taken on
the device before the save and compared after the restore. A step that fails is set aside as
`N.corrupt` and the one before it is used, loudly.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys

import jax
import orbax.checkpoint as ocp

import cnxs_jax
from cnxs_jax import tree as trees
from cnxs_jax.errors import CheckpointError, NumericsError
from cnxs_jax.fingerprint import fingerprint

UNFINISHED = "*.orbax-checkpoint-tmp*"  # of a save that was killed
TRASH = "deleted"  # Orbax renames here before it deletes, so a kill leaves no half-deleted step

for _name in ("absl", "orbax"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # a healthy save writes dozens of lines


@contextlib.contextmanager
def lock(workdir):
    """Holds `workdir` for this process; released by the kernel however the process ends.

    Raises:
        CheckpointError: another process holds it, or it cannot be written.
    """
    path = pathlib.Path(workdir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        file.write("probe\n")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"cannot write: {error.strerror}", workdir, "choose another --workdir"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                "another process is training here", workdir, "wait for it, or use another --workdir"
            ) from None
        yield


def saved_steps(directory):
    """The steps under `directory`, ascending, without opening any."""
    directory = pathlib.Path(directory)
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def _seal(data, meta):
    return hashlib.sha256(json.dumps([data, meta], sort_keys=True).encode()).hexdigest()


class _Damaged(Exception):
    """A step that cannot be trusted."""


# What TensorStore's errors begin with, or hold, when not the files are to blame.
_STATUS = re.compile(
    r"^(RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|UNKNOWN"
    r"|PERMISSION_DENIED|UNAUTHENTICATED)\b|\[OS error \d+: (?!ENOENT|ENOTDIR|EISDIR)"
)
_FILES = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def _chain(error):
    """`error`, what caused it, and so on: Orbax wraps what TensorStore raises."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


def _blames_files(error):
    """Whether an error while reading means files that are damaged or missing.

    Memory, devices, rights and file systems that answer with another error may be well again
    tomorrow, and the step with them.
    """
    machine = (MemoryError, jax.errors.JaxRuntimeError)
    return not any(
        isinstance(e, machine)
        or (isinstance(e, OSError) and not isinstance(e, _FILES))
        or _STATUS.search(str(e))
        for e in _chain(error)
    )


def _first_line(error):
    error = _chain(error)[-1]  # Orbax says where, its cause says what
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: created if missing.
        max_to_keep: the newest steps that are kept, at least 2: one to fall back on.
        resume: whether steps that are there already may be used.

    Raises:
        CheckpointError: the directory holds steps and `resume` is False, or cannot be written.
    """

    def __init__(self, directory, max_to_keep=2, resume=False):
        self.directory = pathlib.Path(directory).expanduser().resolve()
        steps = saved_steps(self.directory)
        if steps and not resume:
            raise CheckpointError(
                f"contains steps {steps[0]}..{steps[-1]} of an earlier run",
                self.directory,
                "add --resume to go on with it, or choose another --workdir",
            )
        self._lead = jax.process_index() == 0
        if self._lead:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Orbax would do it in a thread that a mistake found at once leaves behind, loudly.
            for left in (self.directory / TRASH, *self.directory.glob(UNFINISHED)):
                shutil.rmtree(left, ignore_errors=True)
        self._last = None
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max(max_to_keep, 2),
                todelete_subdir=TRASH,
            ),
        )

    def save(self, step, state, data=None, meta=None):
        """Starts saving `state` (a pytree of arrays) as `step`; nothing if it was just saved.

        Args:
            data: the data iterator's state, JSON.
            meta: JSON to keep with it (configuration, mesh).

        Raises:
            NumericsError: NaN or infinity in `state`.
            CheckpointError: this save was refused, or the one before it failed.
        """
        if step == self._last:
            return
        prints = fingerprint(state)
        meta = {"code": cnxs_jax.__version__, "fingerprint": prints, **(meta or {})}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(trees.flatten(state)),
            data=ocp.args.JsonSave({"data": data}),
            meta=ocp.args.JsonSave({"meta": meta, "seal": _seal(data, meta)}),
        )
        with self._errors(step):
            self.purge()
            if not self._manager.save(step, args=args):
                raise CheckpointError(
                    f"step {step} was not saved: the newest one is {self._manager.latest_step()}",
                    self.directory,
                    "choose another --workdir",
                )
        self._last = step

    def restore(self, abstract, check=None):
        """`(state, data, meta)` of the newest step that verifies, or None if there is no step.

        Args:
            abstract: the state's `jax.ShapeDtypeStruct`s with the shardings to restore to, which
                may be those of another mesh than the one that saved.
            check: called with the stored meta; raises if the run is not this one.

        Raises:
            CheckpointError: a step of another model, a step that cannot be read although nothing
                says that it is damaged (memory, rights, file system), or no step that verifies.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                found = self._restore(step, abstract, check)
            except _Damaged as error:
                self._quarantine(step, str(error))
                continue
            self._last = step
            return found
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} steps can be used; they were set aside as N.corrupt",
                self.directory,
                "start again in another --workdir",
            )
        return None

    def _restore(self, step, abstract, check):
        data, meta = self._read_meta(step)
        if check is not None:
            check(meta)
        _compare_leaves(meta["fingerprint"], abstract, self.directory / str(step))
        flat = trees.flatten(abstract)
        with self._reading(step):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(flat))
            restored = self._manager.restore(step, args=args)["state"]
            state = jax.tree.unflatten(
                jax.tree.structure(abstract), [restored[path] for path in flat]
            )
            prints = fingerprint(state)
        wrong = [path for path, value in prints.items() if value != meta["fingerprint"][path]]
        if wrong:
            raise _Damaged(f"{len(wrong)} arrays differ from their fingerprint, first {wrong[0]!r}")
        return state, data, meta

    def _read_meta(self, step):
        with self._reading(step):
            args = ocp.args.Composite(data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore())
            items = self._manager.restore(step, args=args)
            data, meta = items["data"]["data"], items["meta"]["meta"]
            sealed = items["meta"]["seal"] == _seal(data, meta)
        if not sealed:
            raise _Damaged("the data position or the configuration was changed on disk")
        return data, meta

    @contextlib.contextmanager
    def _reading(self, step):
        """Tells a damaged step from a machine that cannot read it now."""
        try:
            yield
        except NumericsError:
            raise _Damaged("arrays hold NaN or infinity that were not saved") from None
        except Exception as error:  # whatever Orbax and TensorStore raise
            if _blames_files(error):
                raise _Damaged(f"unreadable: {_first_line(error)}") from error
            raise CheckpointError(
                f"cannot read: {_first_line(error)}",
                self.directory / str(step),
                "the step was left as it is: mend the memory, the rights or the file system, "
                "then start again with --resume",
            ) from error

    def _quarantine(self, step, reason):
        bad = self.directory / str(step)
        message = (
            f"CHECKPOINT {step} IS DAMAGED ({reason}); set aside as {bad.name}.corrupt, "
            "falling back to the step before it"
        )
        print(f"warning: {message} [{self.directory}]", file=sys.stderr, flush=True)
        if self._lead and bad.exists():
            target = bad.with_name(f"{bad.name}.corrupt")
            shutil.rmtree(target, ignore_errors=True)
            bad.rename(target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"quarantine {step}")
        self._manager.reload()

    def purge(self):
        """Empties the directory of renamed old steps, which Orbax never does."""
        if self._lead:
            shutil.rmtree(self.directory / TRASH, ignore_errors=True)

    def wait(self):
        """Blocks until the running save is on disk, its small files and directories synced."""
        with self._errors(self._last):
            self._manager.wait_until_finished()
        if self._lead and self._last is not None:
            _fsync(self.directory / str(self._last))
            _fsync_one(self.directory)

    def close(self):
        """Waits, purges and closes. A save that is not waited for would be lost silently."""
        self.wait()
        self.purge()
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        else:  # the error that is under way matters more than one in closing
            with contextlib.suppress(Exception):
                self.close()

    @contextlib.contextmanager
    def _errors(self, step):
        try:
            yield
        except (CheckpointError, NumericsError):
            raise
        except Exception as error:
            self._last = None
            free = shutil.disk_usage(self.directory).free
            raise CheckpointError(
                f"saving step {step} failed: {_first_line(error)}",
                f"{self.directory}, {free / 2**20:.0f} MiB free",
                "the steps before it are intact; free some space and start again with --resume",
            ) from error


def _compare_leaves(stored, abstract, where):
    """Raises CheckpointError unless names, shapes and dtypes agree: another model, not damage."""
    wanted = {p: [str(x.dtype), list(x.shape)] for p, x in trees.flatten(abstract).items()}
    missing = sorted(set(wanted) - set(stored))
    extra = sorted(set(stored) - set(wanted))
    differ = [
        f"{p}: stored {stored[p][:2]}, expected {wanted[p]}"
        for p in sorted(set(wanted) & set(stored))
        if stored[p][:2] != wanted[p]
    ]
    if missing or extra or differ:
        raise CheckpointError(
            f"another model or optimizer: {len(missing)} arrays missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}, {len(differ)} of another shape {differ[:3]}",
            where,
            "use the configuration that wrote it, or another --workdir",
        )


def _fsync_one(path):
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _fsync(directory):
    """Orbax syncs array data only; after a power loss `_METADATA` could be empty."""
    for root, _, names in os.walk(directory):
        for name in names:
            _fsync_one(os.path.join(root, name))
        _fsync_one(root)

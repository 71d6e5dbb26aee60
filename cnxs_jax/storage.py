"""Files written whole or not at all, JSON among them, and paths with `{workdir}` in them."""

import contextlib
import json
import os
import pathlib
import tempfile

from cnxs_jax.errors import ConfigError

ASSETS = pathlib.Path(__file__).parent / "assets"


@contextlib.contextmanager
def replacing(path):
    """A neighbour of `path` to write to, a `pathlib.Path`, that takes its place in the end.

    So a reader, or a run that is killed, never sees half a file. Where the block raises, the
    neighbour goes and an older file stays. Directories are made.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    part = pathlib.Path(part)
    try:
        yield part
        part.chmod(public_mode())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path, text):
    """Writes a text in UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def check_directory(path, where):
    """Raises ConfigError unless `path` is a directory to write to, or can become one.

    Args:
        where: what named it, such as a flag.
    """
    path = pathlib.Path(path).absolute()
    there = next(p for p in (path, *path.parents) if os.path.exists(p))
    if not there.is_dir():
        raise ConfigError(f"{there} is no directory", where, "name a directory")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{there} cannot be written to", where, "name another directory")


def public_mode():
    """The mode that `open` gives a new file; `mkstemp` makes private ones."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_json(path, value, sort_keys=True):
    """`value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def fill(value, workdir):
    """`value` (a string, or dicts and sequences of them) with `{workdir}` and `{assets}` filled."""
    if isinstance(value, str):
        return value.replace("{workdir}", str(workdir)).replace("{assets}", str(ASSETS))
    if isinstance(value, dict):
        return {k: fill(v, workdir) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(fill(v, workdir) for v in value)
    return value

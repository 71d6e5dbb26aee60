"""Small files: text and JSON written whole or not at all, and paths with `{workdir}` in them."""

import json
import os
import pathlib
import tempfile

ASSETS = pathlib.Path(__file__).parent / "assets"


def write_text(path, text):
    """Writes to a neighbour first: a reader, or a run that is killed, never sees half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, public_mode())
        os.replace(part, path)
    except BaseException:
        pathlib.Path(part).unlink(missing_ok=True)
        raise


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

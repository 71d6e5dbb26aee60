"""Weight files of every kind, read safely: `read_tensors(path) -> {key: array}`.

Arrays are read-only views of the memory-mapped file, so that a file of 20 GB costs no memory until
its tensors are converted. Nothing in a file is ever executed, no key becomes a path.
"""

import hashlib
import json
import os
from pathlib import Path

from cnxs_jax.convert import safetensors_file, torch_file
from cnxs_jax.convert.mapped import CONVERT_HINT, HINTS, fail, kind_of
from cnxs_jax.errors import CheckpointError, ConfigError

TORCH = (".pth", ".pt", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH)
MAX_INDEX = 10 * 2**20
MAX_CONFIG = 2**20
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".fp16.safetensors",
    ".bin",
    ".bin.index.json",
)

write_safetensors = safetensors_file.write
read_metadata = safetensors_file.read_metadata


def read_tensors(path, which=None):
    """{key: array} of a `.safetensors`, PyTorch or sharded `.index.json` file.

    Args:
        which: the state dict of a PyTorch file that has several, e.g. "state_dict_ema".

    Raises CheckpointError for a missing, damaged, hostile or unknown file.
    """
    path = os.fspath(path)
    if path.endswith(".index.json"):
        return read_sharded(path)
    if not os.path.isfile(path):
        raise fail("there is no such weight file", path)
    if not path.endswith(SUFFIXES):
        raise fail("unknown kind of weight file", path, f"expected one of {', '.join(SUFFIXES)}")
    kind = kind_of(path)
    expected = "safetensors" if path.endswith(".safetensors") else "zip"
    if kind in HINTS:
        raise fail(f"this is no weight file but {article(kind)}", path, HINTS[kind])
    if kind == "unknown" and expected == "safetensors":
        kind = "safetensors"  # its reader says what is wrong with the header
    if kind != expected:
        fix = (
            CONVERT_HINT
            if kind not in ("safetensors", "zip")
            else "rename it: .pth or .safetensors"
        )
        raise fail(
            f"expected {NAMES[expected]}, this is {NAMES.get(kind, article(kind))}", path, fix
        )
    if kind == "zip":
        return torch_file.read(path, which)
    if which is not None:
        raise fail(f"holds no {which!r}: a safetensors file has one set of weights", path)
    return safetensors_file.read(path)


NAMES = {
    "zip": "a PyTorch zip",
    "safetensors": "a safetensors file",
    "empty": "an empty file",
    "HTML page": "an HTML page",
    "unknown": "something unknown",
}


def article(kind):
    """The kind with its article."""
    return NAMES.get(kind, f"a {kind}")


def read_sharded(path):
    """The tensors of all shards that an `*.index.json` names."""
    directory = os.path.dirname(os.path.abspath(path))
    weight_map = read_index(path)
    shards = {}
    for key, name in weight_map.items():
        shards.setdefault(name, set()).add(key)
    for name in shards:
        check_shard(directory, name, path)
    tensors = {}
    for name, keys in sorted(shards.items()):
        part = read_tensors(os.path.join(directory, name))
        missing, extra = sorted(keys - set(part)), sorted(set(part) - keys)
        if missing or extra:
            what = "lacks" if missing else "holds tensors that the index does not give to it:"
            names = ", ".join((missing or extra)[:20])
            raise fail(f"the shard {name} {what} {names}", path)
        tensors.update(part)
    return tensors


def read_index(path):
    """{key: shard name} of an index file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_INDEX + 1)
    except OSError as error:
        raise fail(f"the index cannot be read: {error.strerror}", path) from None
    if len(data) > MAX_INDEX:
        raise fail(f"an index of more than {MAX_INDEX} bytes", path)
    try:
        pairs = json.loads(data, object_pairs_hook=lambda p: safetensors_file.unique(p, path))
    except (ValueError, RecursionError):
        raise fail("the index is no JSON", path, "download it again") from None
    weight_map = pairs.get("weight_map") if isinstance(pairs, dict) else None
    strings = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    if not strings or not weight_map:
        raise fail("the index has no `weight_map` of names", path)
    return weight_map


def check_shard(directory, name, path):
    """A shard is a weight file beside its index, not a path to anywhere."""
    plain = name == os.path.basename(name) and "\\" not in name and "\0" not in name
    if not plain or not name.endswith(SUFFIXES):
        raise fail(f"the shard name {name[:80]!r} is not a weight file beside the index", path)
    inside = os.path.join(directory, name)
    if not os.path.isfile(inside):
        raise fail(f"the shard {name} is missing", path, "download all shards")
    target, home = os.path.realpath(inside), os.path.realpath(directory)
    if os.path.dirname(target) != home and not in_hub_cache(target, home):
        raise fail(f"the shard {name[:80]!r} is a link out of its directory", path)


def in_hub_cache(target, directory):
    """The Hugging Face cache links `REPO/snapshots/REVISION/...` to `REPO/blobs/HASH`."""
    repo, found, _ = directory.partition(f"{os.sep}snapshots{os.sep}")
    return bool(found) and os.path.dirname(target) == os.path.join(repo, "blobs")


def find_weights(directory):
    """The weight file or index of a component directory; safetensors before pickles."""
    names = [stem + ending for ending in ENDINGS for stem in STEMS]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    have = sorted(p.name for p in directory.iterdir())[:20]
    raise CheckpointError(
        f"no weights, only {', '.join(have)}", str(directory), f"expected one of {', '.join(names)}"
    )


def read_config(config):
    """A dict, as it is or from a JSON file."""
    if isinstance(config, dict):
        return config
    try:
        data = Path(config).read_bytes()
        content = json.loads(data) if len(data) <= MAX_CONFIG else None
    except OSError as error:
        raise ConfigError(f"the config cannot be read: {error.strerror}", str(config)) from None
    except (ValueError, RecursionError, TypeError) as error:
        raise ConfigError(f"the config is no JSON: {error}", str(config)) from None
    if not isinstance(content, dict):
        raise ConfigError("the config is no table of names and values", str(config))
    return content


def digest(path, fix=None):
    """sha256 of a weight file as it lies there. Raises CheckpointError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise fail(f"cannot be read: {error.strerror}", path, fix) from None

"""Weight files of the feature networks: the published ones are in PyTorch's format before 1.6.

That format is a row of pickles followed by raw storages. It is read with the restricted reader of
`cnxs_jax.convert.state_pickle`: nothing but tensors in plain containers is built, nothing is run.
"""

import io

import numpy as np

from cnxs_jax.convert import files, state_pickle, torch_file
from cnxs_jax.convert.mapped import DTYPES, fail, is_count

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle: one number
PICKLES = ("protocol", "system", "tensors", "storage keys")


def read(path):
    """{key: read-only array} of a `.safetensors` or PyTorch file, of either format.

    Raises:
        CheckpointError: a missing, damaged, hostile or unknown file.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(2)
    except OSError as error:
        raise fail(f"the weight file cannot be read: {error.strerror}", path) from None
    return read_legacy(path) if head == b"\x80\x02" else files.read_tensors(path)


def read_legacy(path):
    """{key: read-only array} of a file that `torch.save` wrote before PyTorch 1.6.

    Raises:
        CheckpointError: a damaged file, or one that asks for anything but tensors.
    """
    with open(path, "rb") as file:
        head = file.read(state_pickle.MAX_PICKLE)
    if not head.startswith(MAGIC):
        raise fail("not a file of torch.save", path)
    stream, found = io.BytesIO(head), {}
    stream.seek(len(MAGIC))
    for name in PICKLES:
        start = stream.tell()
        state_pickle.check_opcodes(stream, path)
        found[name] = state_pickle.unpickle(head[start : stream.tell()], path, Legacy)
    system, keys = found["system"], found["storage keys"]
    if not isinstance(system, dict) or not system.get("little_endian") or type(keys) is not list:
        raise fail("not written by torch.save on a little-endian machine", path)
    refs = torch_file.pick(found["tensors"], None, path)
    views = torch_file.Views(path, {}, "")
    views.starts = _storages(views.mapped, stream.tell(), keys, refs, path)
    return views.all(refs)


def fold_batch_norms(tensors, epsilon):
    """{key: array} in which each `X.conv` and the `X.bn` after it are one convolution with bias.

    `X.weight` is scaled by its channel, `X.bias` is new; other keys are passed on. In float64.

    Raises:
        KeyError: a convolution without its normalisation.
    """
    folded = {k: v for k, v in tensors.items() if ".conv." not in k and ".bn." not in k}
    for key in [k for k in tensors if k.endswith(".conv.weight")]:
        name = key.removesuffix(".conv.weight")
        weight, bias, mean, variance = (
            np.asarray(tensors[f"{name}.bn.{k}"], np.float64)
            for k in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + epsilon)
        folded[f"{name}.weight"] = (tensors[key] * scale[:, None, None, None]).astype(np.float32)
        folded[f"{name}.bias"] = (bias - mean * scale).astype(np.float32)
    return folded


class Legacy(state_pickle.Restricted):
    """Storages have one more field here: which part of another one they are, never used."""

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) != 6 or pid[-1] is not None:
            raise fail("the pickle refers to something that is no tensor storage", self.path)
        return super().persistent_load(pid[:5])


def _storages(mapped, at, keys, refs, path):
    """{storage key: (first byte, bytes)}: a count of 8 bytes before each storage's elements."""
    wanted = {r.storage.key: r.storage for r in refs.values() if hasattr(r.storage, "key")}
    starts = {}
    for key in keys:
        storage = wanted.get(key) if isinstance(key, str) else None
        count = int.from_bytes(mapped.buffer[at : at + 8], "little")
        if storage is None or not is_count(count) or count != storage.count:
            raise fail(f"the storage {str(key)[:40]!r} does not belong to its tensors", path)
        size = count * DTYPES[storage.dtype].itemsize
        if at + 8 + size > mapped.size:
            raise fail(f"the storage {key[:40]!r} is cut short", path, "download it again")
        starts[key] = at + 8, size
        at += 8 + size
    missing = set(wanted) - set(starts)
    if missing:
        raise fail(f"the storage {min(missing)[:40]!r} is missing", path, "download it again")
    return starts

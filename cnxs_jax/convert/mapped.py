"""Bytes of a file as arrays without reading it: what both weight formats share."""

import math
import mmap
import os
import re
import reprlib

import ml_dtypes
import numpy as np

from cnxs_jax.errors import CheckpointError

MAX_TENSORS = 100_000
MAX_KEY = 1024
MAX_DIMS = 8

# Little-endian on every machine; F8 formats are left out on purpose (no model here uses them).
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

LFS = "git-LFS pointer"
KINDS = (
    (b"PK\x03\x04", "zip"),
    (b"version https://git-lfs", LFS),
    (b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (b"\x1f\x8b", "gzip archive"),
    (b"\x80", "bare pickle (PyTorch before 1.6, or none at all)"),
    (b"\x93NUMPY", "numpy array"),
)
HINTS = {
    "empty": "download it again",
    LFS: "run `git lfs pull` in the repository that it came from, or download the real file",
    "HTML page": "download it again: the server answered with a web page, e.g. for a login",
    "JSON document": "download it again: this is an answer of a server or a config, no weights",
}
CONVERT_HINT = (
    "with PyTorch, in a sandbox if you do not trust the file: "
    "`torch.save(torch.load(old, weights_only=True), new)` writes the current zip format, "
    "`safetensors.torch.save_file` is better still"
)


def fail(what, path, fix=None):
    """The CheckpointError of every reader here: names the file."""
    return CheckpointError(what, str(path), fix)


def kind_of(path):
    """What the file's first bytes are: "zip", "safetensors", or the name of something else."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise fail(f"the weight file cannot be read: {error.strerror}", path) from None
    if not head:
        return "empty"
    # A length below 2**48, then JSON. Before the magics: the length's first byte may be any.
    if head[8:9] == b"{" and head[6:8] == b"\0\0":
        return "safetensors"
    for magic, kind in KINDS:
        if head.startswith(magic):
            return kind
    if re.match(rb"\s*<(!doctype|html|\?xml|head|body)", head, re.IGNORECASE):
        return "HTML page"
    if head[257:262] == b"ustar":
        return "tar archive (PyTorch before 0.1.10)"
    return "JSON document" if re.match(rb"\s*[{\[]", head) else "unknown"


class Mapped:
    """A read-only memory map that hands out views; the file is not loaded into memory."""

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def view(self, dtype, shape, start, strides=None):
        """A strided view (strides in elements) at byte `start`, checked against the file's end."""
        count, extent = math.prod(shape), math.prod(n or 1 for n in shape)
        if extent * dtype.itemsize >= 2**62:  # numpy refuses it even where another size is 0
            raise fail(f"a tensor of the impossible shape {shape}", self.path)
        if not count:
            return np.empty(shape, dtype)
        if strides is None:
            last = count - 1
        else:
            last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            # The stride of a single element is never used, so a file may claim any.
            strides = [
                s * dtype.itemsize if n > 1 else 0 for n, s in zip(shape, strides, strict=True)
            ]
        if start < 0 or start + (last + 1) * dtype.itemsize > self.size:
            raise fail("a tensor reaches beyond the end of the file", self.path)
        return np.ndarray(shape, dtype, self.buffer, start, strides)


def check_key(key, path):
    """Refuses names that no module has: empty, over-long, with control characters."""
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY or not key.isprintable():
        raise fail(f"a tensor has the impossible name {reprlib.repr(key)}", path)


def is_count(value):
    """A non-negative int that is no bool."""
    return type(value) is int and 0 <= value < 2**62

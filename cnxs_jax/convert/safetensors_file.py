"""safetensors, read and written strictly and without copies.

The reference implementation accepts duplicate keys and headers of 90 MB, and its numpy writer
stores wrong values for arrays that are not C-contiguous; so both directions are done here.
"""

import json
import os
import struct

import ml_dtypes
import numpy as np

from cnxs_jax.convert.mapped import (
    DTYPES,
    MAX_DIMS,
    MAX_TENSORS,
    NAMES,
    Mapped,
    check_key,
    fail,
    is_count,
)
from cnxs_jax.storage import replacing

MAX_HEADER = 10 * 2**20


def read(path):
    """{key: read-only array}, memory-mapped. Raises CheckpointError."""
    header, start = read_header(path)
    mapped = Mapped(path)
    return {
        key: mapped.view(DTYPES[e["dtype"]], tuple(e["shape"]), start + e["data_offsets"][0])
        for key, e in header.items()
    }


def read_metadata(path):
    """The strings that the file carries beside its tensors."""
    return raw_header(path)[1]


def read_header(path):
    """`({key: entry}, offset of the first byte of data)`, every field checked."""
    header, _, start = raw_header(path)
    if len(header) > MAX_TENSORS:
        raise fail(f"{len(header)} tensors, at most {MAX_TENSORS}", path)
    for key, entry in header.items():
        check_entry(key, entry, path)
    check_coverage(header, os.path.getsize(path) - start, path)
    return header, start


def raw_header(path):
    """`({key: entry}, {name: string}, offset of the data)`, the entries unchecked."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if length < 2 or length > MAX_HEADER or 8 + length > size:
            raise fail(
                f"no safetensors file: a header of {length} bytes in a file of {size} bytes"
                f" (at most {MAX_HEADER})",
                path,
                "download it again: it is cut short or something else",
            )
        header = parse(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fail("the safetensors metadata is no table of strings", path)
    return header, metadata, 8 + length


def parse(data, path):
    """The header's JSON; duplicate keys are refused, as readers disagree on which one counts."""
    if data[:1] != b"{":
        raise fail("the safetensors header does not start with '{'", path)
    if data.count(b'"data_offsets"') > MAX_TENSORS:  # before a parse that would take seconds
        raise fail(f"more than {MAX_TENSORS} tensors", path)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=lambda p: unique(p, path))
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise fail(f"the safetensors header is no JSON: {what}", path) from None


def unique(pairs, path):
    """`dict(pairs)`, refusing a key that comes twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise fail(f"the key {twice[:80]!r} is there twice", path)
    return table


def check_entry(key, entry, path):
    """dtype, shape and offsets of one tensor."""
    check_key(key, path)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"{key!r} is not described by dtype, shape and data_offsets", path)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(
            f"{key!r} has dtype {str(dtype)[:20]!r}, expected one of {', '.join(DTYPES)}",
            path,
            "convert the file to BF16, F16 or F32",
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(is_count, shape)):
        raise fail(f"{key!r} has the impossible shape {str(shape)[:60]}", path)
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(map(is_count, offsets))
    if not pair or offsets[0] > offsets[1]:
        raise fail(f"{key!r} has the impossible data_offsets {str(offsets)[:60]}", path)
    expected = DTYPES[dtype].itemsize
    for n in shape:
        expected *= n
    if offsets[1] - offsets[0] != expected:
        got = offsets[1] - offsets[0]
        raise fail(f"{key!r} holds {got} bytes, {dtype} {shape} needs {expected}", path)


def check_coverage(header, size, path):
    """The tensors must fill the data without hole, overlap or rest."""
    at = 0
    for begin, end, key in sorted((*e["data_offsets"], k) for k, e in header.items()):
        if begin != at:
            raise fail(f"{key!r} starts at byte {begin}, expected {at}: a hole or overlap", path)
        at = end
    if at != size:
        raise fail(
            f"{size} bytes of data, the header describes {at}",
            path,
            "download it again: it is cut short or has something appended",
        )


def write(path, tensors, metadata=None, dtype=None):
    """Writes {key: array} atomically: temporary file, fsync, read back, rename.

    Args:
        dtype: "float32" or "bfloat16" for all floating tensors, None to keep each one's own.

    Raises CheckpointError when the disk refuses or gives back something else; an older file of
    that name is then untouched.
    """
    arrays = {key: storable(key, array, dtype, path) for key, array in tensors.items()}
    order = sorted(arrays, key=lambda k: (-arrays[k].dtype.itemsize, k))
    try:
        with replacing(path) as part:
            with part.open("wb") as file:
                file.write(header_bytes(arrays, order, metadata or {"format": "pt"}))
                for key in order:
                    file.write(np.array(arrays[key], order="C").tobytes())
                file.flush()
                os.fsync(file.fileno())
            verify(part, arrays, path)
    except OSError as error:
        raise fail(f"cannot write the weights: {error.strerror}", path) from None


def storable(key, array, dtype, path):
    """The array in the dtype to store, little-endian; refuses what the format cannot hold."""
    check_key(key, path)
    array = np.asarray(array)
    if dtype is not None and (array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16):
        array = array.astype(dtype)
    if array.dtype.newbyteorder("<") not in NAMES:
        raise fail(f"{key!r} has dtype {array.dtype}, which safetensors cannot hold", path)
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def header_bytes(arrays, order, metadata):
    """Length and JSON, padded so that the data is aligned to 8 bytes."""
    header, at = {"__metadata__": metadata}, 0
    for key in order:
        array = arrays[key]
        end = at + array.nbytes
        header[key] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, end],
        }
        at = end
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return struct.pack("<Q", len(data)) + data


def verify(part, arrays, path):
    """Compares what is on disk with what was meant, byte for byte."""
    back = read(part)
    for key, array in arrays.items():
        same = back[key].shape == array.shape and back[key].dtype == array.dtype
        if not same or back[key].tobytes() != array.tobytes():
            raise fail(f"{key!r} reads back differently from what was written", path)

"""PyTorch `.pth`, `.pt`, `.ckpt` and `.bin` files, read without torch and without running them.

Since PyTorch 1.6 such a file is a zip: a pickle of the structure, and one member a storage. The
pickle is read by `state_pickle`; tensors are views of the file, checked against the bounds of
their storage.
"""

import os
import reprlib
import struct
import zipfile
import zlib

from cnxs_jax.convert.mapped import (
    CONVERT_HINT,
    DTYPES,
    MAX_DIMS,
    MAX_TENSORS,
    Mapped,
    check_key,
    fail,
    is_count,
)
from cnxs_jax.convert.state_pickle import MAX_PICKLE, Ref, Storage, unpickle

ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
)
STATE_DICTS = ("state_dict", "state_dict_ema", "model_state_dict", "module", "ema")


def read(path, which=None):
    """{key: read-only array} of the state dict in the file, memory-mapped.

    Args:
        which: the name of the state dict where the file has several ("state_dict_ema"); by
            default "state_dict", or the top level where the tensors lie there.

    Raises CheckpointError for anything but plain tensors in plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = check_members(archive, path)
            prefix = next((n[: -len("data.pkl")] for n in members if n.endswith("/data.pkl")), None)
            if prefix is None or prefix.count("/") != 1:
                raise fail("a zip without data.pkl: not written by torch.save", path, CONVERT_HINT)
            if prefix + "byteorder" in members:
                with archive.open(prefix + "byteorder") as file:
                    if file.read(8) != b"little":
                        raise fail("written on a big-endian machine", path, CONVERT_HINT)
            if members[prefix + "data.pkl"].file_size > MAX_PICKLE:
                raise fail(f"a pickle of more than {MAX_PICKLE} bytes", path)
            content = unpickle(archive.read(prefix + "data.pkl"), path)
    except ZIP_ERRORS as error:
        raise fail(f"damaged zip: {str(error)[:80]}", path, "download it again") from None
    return Views(path, members, prefix).all(pick(content, which, path))


def check_members(archive, path):
    """{name: info}; refuses what `torch.save` never writes, compression above all."""
    infos = archive.infolist()
    if len(infos) > MAX_TENSORS:
        raise fail(f"{len(infos)} zip members, at most {MAX_TENSORS}", path)
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise fail(f"the zip member {info.filename[:80]!r} is compressed", path, CONVERT_HINT)
        if info.flag_bits & 1:
            raise fail(f"the zip member {info.filename[:80]!r} is encrypted", path)
    members = {info.filename: info for info in infos}
    if len(members) != len(infos):
        raise fail("two zip members have the same name", path)
    # Each member's checksum is computed: 100 000 names for the same bytes would take hours.
    if sum(info.file_size for info in infos) > os.path.getsize(path):
        raise fail("the zip members overlap or are cut short", path, "download it again")
    return members


def pick(content, which, path):
    """{key: Ref} of one state dict; entries that are no tensors (epoch, config) are dropped."""
    if not isinstance(content, dict):
        raise fail(f"holds a {type(content).__name__}, expected a dict of tensors", path)
    tables = {id(v): v for v in content.values() if isinstance(v, dict)}  # each is looked at once
    full = {i for i, v in tables.items() if any(isinstance(r, Ref) for r in v.values())}
    nested = {k: v for k, v in content.items() if isinstance(k, str) and id(v) in full}
    if which is None:
        which = next((k for k in STATE_DICTS if k in nested), None)
    elif which not in nested:
        known = sorted(nested)[:20] or "no named state dicts"
        raise fail(f"holds no {which!r}; it has {known}", path)
    chosen = content if which is None else nested[which]
    refs = {k: v for k, v in chosen.items() if isinstance(v, Ref)}
    if not refs:
        names = [str(k)[:40] for k in list(chosen)[:20]]
        raise fail(f"holds no tensors; its entries are {names}", path)
    if len(refs) > MAX_TENSORS:
        raise fail(f"{len(refs)} tensors, at most {MAX_TENSORS}", path)
    return refs


class Views:
    """Turns `Ref`s into views of the memory-mapped file."""

    def __init__(self, path, members, prefix):
        self.path, self.members, self.prefix = path, members, prefix
        self.mapped = Mapped(path)
        self.starts = {}

    def all(self, refs):
        return {key: self.tensor(key, ref) for key, ref in refs.items()}

    def start(self, storage):
        """First byte of the storage in the file; size and CRC-32 are checked once."""
        if storage.key not in self.starts:
            info = self.members.get(f"{self.prefix}data/{storage.key}")
            if info is None:
                raise fail(f"the storage {storage.key[:40]!r} is missing", self.path)
            head = self.mapped.buffer[info.header_offset : info.header_offset + 30]
            if len(head) != 30 or head[:4] != b"PK\x03\x04":
                raise fail(f"damaged zip at byte {info.header_offset}", self.path)
            at = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
            if at + info.file_size > self.mapped.size:
                raise fail(f"the storage {storage.key[:40]!r} is cut short", self.path)
            self.check_crc(storage, info, at)
            self.starts[storage.key] = at, info.file_size
        return self.starts[storage.key]

    def check_crc(self, storage, info, at):
        crc = zlib.crc32(memoryview(self.mapped.buffer)[at : at + info.file_size])
        if crc != info.CRC:
            raise fail(
                f"the bytes of storage {storage.key[:40]!r} do not match their checksum",
                self.path,
                "download it again",
            )

    def tensor(self, key, ref):
        check_key(key, self.path)
        storage, offset, size, stride = ref
        if not isinstance(storage, Storage) or not is_count(offset):
            raise fail(f"{key!r} has no storage or an impossible offset", self.path)
        for values in (size, stride):
            counts = isinstance(values, tuple) and all(map(is_count, values))
            if not counts or len(values) != len(size) or len(values) > MAX_DIMS:
                # reprlib: the text of tuples that hold one tuple twice, 60 deep, has no end.
                raise fail(
                    f"{key!r} has the impossible size or stride {reprlib.repr(values)[:60]}",
                    self.path,
                )
        dtype = DTYPES[storage.dtype]
        at, nbytes = self.start(storage)
        if storage.count * dtype.itemsize > nbytes:
            raise fail(
                f"{key!r}: storage of {nbytes} bytes for {storage.count} elements", self.path
            )
        count = 1
        for n in size:
            count *= n
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        # An element used twice (stride 0) would let a small file become a tensor of any size.
        if count and (last >= storage.count or count > storage.count):
            raise fail(f"{key!r} {size} reaches outside its storage of {storage.count}", self.path)
        return self.mapped.view(dtype, size, at + offset * dtype.itemsize, stride)

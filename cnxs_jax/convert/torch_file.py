"""PyTorch `.pth`, `.pt`, `.ckpt` and `.bin` files, read without torch and without running them.

A pickle is a program. Only the opcodes and the four kinds of globals that a state dict needs are
allowed here; everything else is refused by name before it is looked up. Tensors are views of the
file, checked against the bounds of their storage.
"""

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

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
from cnxs_jax.errors import CheckpointError

MAX_PICKLE = 16 * 2**20
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# What `torch.save` of nested dicts, lists, numbers and tensors emits in pickle protocol 2.
OPCODES = """
    PROTO STOP MARK POP POP_MARK DUP GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE BININT
    BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE SHORT_BINSTRING EMPTY_DICT DICT
    SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    BINPUT LONG_BINPUT BINGET LONG_BINGET EMPTY_SET ADDITEMS
"""
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
ALLOWED = frozenset(OPCODES.split())
STATE_DICTS = ("state_dict", "state_dict_ema", "model_state_dict", "module", "ema")


class Storage(NamedTuple):
    """A typed storage: the zip member `data/<key>`."""

    dtype: str
    key: str
    count: int


class Ref(NamedTuple):
    """A tensor that is not looked up yet; offsets, sizes and strides in elements."""

    storage: Storage
    offset: int
    size: tuple
    stride: tuple


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
            if (
                members.get(prefix + "byteorder")
                and archive.read(prefix + "byteorder") != b"little"
            ):
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
    return members


def unpickle(data, path):
    """The content of data.pkl with `Ref`s for tensors. Nothing of the file is executed."""
    check_opcodes(data, path)
    try:
        return Restricted(io.BytesIO(data), path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle can make the machine fail in any way it likes
        raise fail(f"damaged pickle: {type(error).__name__} {str(error)[:80]}", path) from None


def check_opcodes(data, path):
    """Refuses opcodes beyond a state dict's, and memo slots that no honest pickler would use."""
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(data):
            count += 1
            if opcode.name not in ALLOWED:
                raise fail(
                    f"the pickle uses {opcode.name}, which no state dict needs", path, CONVERT_HINT
                )
            # The C unpickler allocates twice the index: one opcode could ask for 64 GB.
            if opcode.name == "LONG_BINPUT" and argument > count:
                raise fail(f"the pickle stores into memo slot {argument}", path)
    except (ValueError, UnicodeDecodeError, struct.error) as error:
        raise fail(f"damaged pickle: {str(error)[:80]}", path, "download it again") from None


class Restricted(pickle.Unpickler):
    """Knows tensors, storages, parameters and OrderedDict, and nothing else."""

    def __init__(self, file, path):
        super().__init__(file, encoding="utf-8")
        self.path = path

    def find_class(self, module, name):
        found = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        }.get((module, name))
        if found is None and module == "torch" and name in STORAGES:
            found = STORAGES[name]
        if found is None:
            raise fail(
                f"the pickle asks for {module[:80]}.{name[:80]}; only tensors in dicts are read,"
                " nothing was executed",
                self.path,
                CONVERT_HINT,
            )
        return found

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise fail("the pickle refers to something that is no tensor storage", self.path)
        _, dtype, key, _, count = pid
        if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(key, str):
            raise fail("the pickle describes an impossible storage", self.path)
        if not is_count(count):
            raise fail(f"a storage of {str(count)[:40]} elements", self.path)
        return Storage(dtype, key, count)


def rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """What `torch._utils._rebuild_tensor_v2` is called with, kept for later."""
    return Ref(storage, offset, size, stride)


def rebuild_parameter(data, requires_grad=False, hooks=None):
    """A parameter is its tensor."""
    return data


def pick(content, which, path):
    """{key: Ref} of one state dict; entries that are no tensors (epoch, config) are dropped."""
    if not isinstance(content, dict):
        raise fail(f"holds a {type(content).__name__}, expected a dict of tensors", path)
    nested = {
        k: v
        for k, v in content.items()
        if isinstance(k, str)
        and isinstance(v, dict)
        and any(isinstance(r, Ref) for r in v.values())
    }
    if which is None:
        which = next((k for k in STATE_DICTS if k in nested), None)
    elif which not in nested:
        raise fail(f"holds no {which!r}; it has {sorted(nested) or 'no named state dicts'}", path)
    chosen = content if which is None else nested[which]
    refs = {k: v for k, v in chosen.items() if isinstance(v, Ref)}
    if not refs:
        raise fail(f"holds no tensors; its entries are {[str(k)[:40] for k in chosen][:20]}", path)
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
                raise fail(
                    f"{key!r} has the impossible size or stride {str(values)[:60]}", self.path
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
        if not count:
            return np.empty(size, dtype)
        return self.mapped.view(dtype, size, at + offset * dtype.itemsize, stride)

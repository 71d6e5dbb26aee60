"""Builders of weight files, good and hostile, independent of the readers under test."""

import copy
import json
import struct
import zipfile

import numpy as np

MARKER = "executed"


# safetensors


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header, body=b"", length=None):
    """The bytes of a file: `header` a dict or raw bytes, `length` the length to claim."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + body


def good_safetensors():
    header = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}
    return safetensors(header, np.arange(6, dtype="<f4").tobytes() + bytes(8))


HEAD_A = entry("F32", [2], 0, 8)
BAD_SAFETENSORS = {
    "empty": b"",
    "seven_bytes": b"\x10\0\0\0\0\0\0",
    "length_only": struct.pack("<Q", 100),
    "length_2_63": safetensors({"a": HEAD_A}, bytes(8), 2**63),
    "length_max": safetensors({"a": HEAD_A}, bytes(8), 2**64 - 1),
    "length_100_000_001": safetensors({"a": HEAD_A}, bytes(8), 100_000_001),
    "length_short": safetensors({"a": HEAD_A}, bytes(8), 20),
    "trailing_byte": safetensors({"a": HEAD_A}, bytes(9)),
    "missing_byte": safetensors({"a": HEAD_A}, bytes(7)),
    "hole": safetensors({"a": HEAD_A, "b": entry("F32", [2], 12, 20)}, bytes(20)),
    "overlap": safetensors({"a": HEAD_A, "b": entry("F32", [2], 4, 12)}, bytes(12)),
    "starts_late": safetensors({"a": entry("F32", [2], 4, 12)}, bytes(12)),
    "begin_after_end": safetensors({"a": entry("F32", [2], 8, 0)}, bytes(8)),
    "negative_offset": safetensors({"a": entry("F32", [2], -8, 0)}, bytes(8)),
    "float_offset": safetensors({"a": entry("F32", [2], 0.0, 8.0)}, bytes(8)),
    "three_offsets": safetensors({"a": {**HEAD_A, "data_offsets": [0, 4, 8]}}, bytes(8)),
    "shape_disagrees": safetensors({"a": entry("F32", [3], 0, 8)}, bytes(8)),
    "negative_shape": safetensors({"a": entry("F32", [-1, -2], 0, 8)}, bytes(8)),
    "boolean_shape": safetensors({"a": entry("F32", [True, 2], 0, 8)}, bytes(8)),
    "overflow_shape": safetensors({"a": entry("F32", [2**40, 2**40], 0, 8)}, bytes(8)),
    "zero_times_huge": safetensors({"a": entry("F32", [0, 2**63], 0, 0)}),
    "zero_times_2_61": safetensors({"a": entry("F32", [0, 2**61], 0, 0)}),
    "65_dimensions": safetensors({"a": entry("F32", [1] * 65, 0, 4)}, bytes(4)),
    "unknown_dtype": safetensors({"a": entry("F8_E4M3", [8], 0, 8)}, bytes(8)),
    "dtype_no_string": safetensors({"a": entry(["F32"], [2], 0, 8)}, bytes(8)),
    "extra_field": safetensors({"a": {**HEAD_A, "code": "x"}}, bytes(8)),
    "entry_is_list": safetensors({"a": [1, 2]}, bytes(8)),
    "header_is_list": safetensors(b'["a"]', bytes(8)),
    "bad_utf8": safetensors(b'{"\xff\xfe": 1}'),
    "no_json": safetensors(b'{"a": }     '),
    "nan_literal": safetensors(
        b'{"a": {"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)
    ),
    "deep_json": safetensors(b'{"a":' + b"[" * 200_000, bytes(8)),
    "huge_integer": safetensors(b'{"a": ' + b"9" * 100_000 + b"}", bytes(8)),
    "duplicate_key": safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "empty_key": safetensors({"": HEAD_A}, bytes(8)),
    "nul_key": safetensors({"a\0b": HEAD_A}, bytes(8)),
    "long_key": safetensors({"a" * 1_000_000: HEAD_A}, bytes(8)),
    "metadata_no_strings": safetensors({"__metadata__": {"a": [1]}, "a": HEAD_A}, bytes(8)),
    "header_bomb": safetensors(b"{" + b" " * (11 * 2**20) + b"}"),
    "tensor_bomb": safetensors(
        "{{{}}}".format(
            ",".join(
                f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(100_001)
            )
        ).encode()
    ),
    "html": b"<!DOCTYPE html><html><body>Please log in</body></html>",
    "json_error": b'{"error": "Repository not found"}',
    "lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "pickle": b"\x80\x02}q\x00.",
    "noise": bytes(range(1, 256)),
}


# PyTorch zips, opcode by opcode


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *arguments):
    return function + tuple_of(*arguments) + b"R"


def item(key, value=b"K\1"):
    """A dict of one entry, whose key is any program."""
    return b"}" + key + value + b"s"


def deep(count=10**6):
    """A tuple in a tuple in a tuple."""
    return b")" + b"\x85" * count


def deep_by_memo(count=100_000):
    """The same, with the stack empty in between."""
    return b")q\5" + b"0h\5\x85q\5" * count


def deep_by_calls(count=100_000):
    """Tensors as the storage of tensors: these are tuples, too."""
    function = name("torch._utils", "_rebuild_tensor_v2") + b"q\5" + b"0"
    return function + b")q\6" + b"0h\5(h\6NNNtRq\6" * count


def wide(depth=40):
    """2**40 tuples to hash or print, in 160 bytes: each holds the one before twice."""
    return b")" + b"q\5h\5\x86" * depth


def dict_of(items):
    return b"}(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def tensor(key="0", count=6, offset=0, size=(2, 3), stride=(3, 1), storage="FloatStorage"):
    """A call of torch's function; `size` is a tuple of integers or a program."""
    persistent = tuple_of(
        text("storage"), name("torch", storage), text(key), text("cpu"), integer(count)
    )
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        persistent + b"Q",
        integer(offset),
        size if isinstance(size, bytes) else tuple_of(*map(integer, size)),
        tuple_of(*map(integer, stride)),
        b"\x89",
        call(name("collections", "OrderedDict")),
    )


def program(content):
    return b"\x80\x02" + content + b"."


def write_zip(path, pickle_bytes, data=None, compression=zipfile.ZIP_STORED, extra=()):
    """A file as torch.save makes it; `data` {storage key: bytes}."""
    data = {"0": np.arange(6, dtype="<f4").tobytes()} if data is None else data
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle_bytes)
        archive.writestr("archive/byteorder", "little")
        for key, value in data.items():
            archive.writestr(f"archive/data/{key}", value)
        for key, value in extra:
            archive.writestr(key, value)


def attack(content, **keywords):
    return lambda path: write_zip(path, program(dict_of({"a": tensor(), "x": content})), **keywords)


def only(**keywords):
    return lambda path: write_zip(path, program(dict_of({"a": tensor(**keywords)})))


def same_dict_often(path):
    inner = dict_of({str(i): b"N" for i in range(20_000)})
    again = b"h\5".join(text(str(i)) for i in range(5_000))
    write_zip(path, program(b"}(" + text("x") + inner + b"q\5" + again + b"h\5u"))


def overlapping(path, count=500):
    """Many names for the same megabyte: each would be read for its checksum."""
    data = {"0": bytes(10**6)}
    tensors = {str(i): tensor(str(i)) for i in range(count)}
    write_zip(path, program(dict_of(tensors)), data)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(1, count):
            info = copy.copy(archive.getinfo("archive/data/0"))
            info.filename = f"archive/data/{i}"
            archive.filelist.append(info)
        archive.writestr("archive/version", "3")


def raw(data):
    return lambda path: path.write_bytes(data)


TOUCH = text(f"touch {MARKER}")
EVAL = text(f"open({MARKER!r}, 'w')")
# The state (None, {"__defaults__": None}) of BUILD: sets attributes.
DEFAULTS = b"N" + dict_of({"__defaults__": b"N"}) + b"\x86"
BAD_TORCH = {
    "os_system": attack(call(name("os", "system"), TOUCH)),
    "posix_system": attack(call(name("posix", "system"), TOUCH)),
    "subprocess": attack(call(name("subprocess", "check_output"), text("ls"))),
    "eval": attack(call(name("builtins", "eval"), EVAL)),
    "exec_python2": attack(call(name("__builtin__", "exec"), EVAL)),
    "getattr_chain": attack(
        call(call(name("builtins", "getattr"), name("os", "path"), text("system")), TOUCH)
    ),
    "dotted_name": attack(call(name("collections", "OrderedDict.__init__.__globals__"), TOUCH)),
    "torch_hub": attack(call(name("torch.hub", "load"), text("evil/repo"), text("model"))),
    "torch_load": attack(call(name("torch", "load"), TOUCH)),
    "numpy_scalar": attack(call(name("numpy.core.multiarray", "scalar"), integer(1))),
    "namespace": attack(call(name("argparse", "Namespace"))),
    "pathlib": attack(call(name("pathlib", "PosixPath"), text("/etc"))),
    "runpy": attack(call(name("runpy", "_run_code"), EVAL)),
    "instance_opcode": attack(b"(" + TOUCH + b"ios\nsystem\n"),
    "object_opcode": attack(b"(" + name("os", "system") + TOUCH + b"o"),
    "stack_global": attack(text("os") + text("system") + b"\x93"),
    "extension": attack(b"\x82\x01"),
    "new_object": attack(name("collections", "OrderedDict") + b")\x81"),
    "memo_bomb": attack(b"}r" + struct.pack("<I", 2**31)),
    "deep_key": attack(item(deep())),
    "deep_key_by_memo": attack(item(deep_by_memo())),
    "deep_key_by_calls": attack(item(deep_by_calls())),
    "deep_value": attack(b"]" * 10**6 + b"a" * (10**6 - 1)),
    "wide_key": attack(item(wide())),
    "wide_key_of_ordered_dict": attack(
        call(name("collections", "OrderedDict"), b"](](" + wide() + b"K\1ee")
    ),
    "wide_key_in_set": attack(b"\x8f(" + wide() + b"\x90"),
    "deep_size": only(size=deep()),
    "wide_size": only(size=wide()),
    "zero_times_2_61": only(size=(0, 2**61), stride=(1, 1)),
    "colliding_keys": attack(
        b"}(" + b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(30_000)) + b"u"
    ),
    "same_dict_often": same_dict_often,
    "overlapping_members": overlapping,
    "function_defaults": attack(name("torch._utils", "_rebuild_tensor_v2") + DEFAULTS + b"b"),
    "class_attribute": attack(name("collections", "OrderedDict") + DEFAULTS + b"b"),
    "pickle_cut": lambda path: write_zip(path, program(dict_of({"a": tensor()}))[:-20]),
    "pickle_noise": lambda path: write_zip(path, bytes(range(256))),
    "stack_underflow": lambda path: write_zip(path, program(b"R")),
    "no_dict": lambda path: write_zip(path, program(tensor())),
    "no_tensors": lambda path: write_zip(path, program(dict_of({"epoch": integer(3)}))),
    "stride_bomb": only(size=(10**9,), stride=(0,)),
    "out_of_storage": only(size=(2, 3), stride=(4, 1)),
    "offset_beyond": only(offset=1),
    "negative_stride": only(stride=(-3, 1)),
    "negative_size": only(size=(-2, 3)),
    "negative_offset": only(offset=-1),
    "ranks_differ": only(stride=(1,)),
    "storage_too_long": only(count=7),
    "storage_huge": only(count=2**70),
    "storage_missing": only(key="1"),
    "storage_traversal": only(key="../data.pkl"),
    "complex_storage": only(storage="ComplexFloatStorage"),
    "deflate_bomb": lambda path: write_zip(
        path, program(dict_of({"a": tensor()})), {"0": bytes(10**7)}, zipfile.ZIP_DEFLATED
    ),
    "foreign_zip": lambda path: zipfile.ZipFile(path, "w").writestr("word/document.xml", "<a/>"),
    "two_members": attack(integer(1), extra=[("archive/data/0", b"12345678")]),
    "legacy_pickle": raw(b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M"),
    "legacy_tar": raw(b"tensors" + bytes(250) + b"ustar\x00" + bytes(600)),
    "seven_zip": raw(b"7z\xbc\xaf\x27\x1c" + bytes(40)),
    "gzip": raw(b"\x1f\x8b" + bytes(40)),
    "npy": raw(b"\x93NUMPY\x01\x00" + bytes(40)),
    "html": raw(b"\n<html><head><title>404</title></head></html>"),
    "lfs_pointer": raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    "empty": raw(b""),
    "safetensors_inside": raw(good_safetensors()),
}

BAD_INDEX = {
    "parent": {"a": "../weights.safetensors"},
    "absolute": {"a": "/etc/passwd.safetensors"},
    "subdirectory": {"a": "sub/weights.safetensors"},
    "backslash": {"a": "..\\weights.safetensors"},
    "nul": {"a": "good.safetensors\0.bin"},
    "link": {"a": "link.safetensors"},
    "missing_shard": {"a": "absent.safetensors"},
    "itself": {"a": "model.safetensors.index.json"},
    "key_elsewhere": {"a": "good.safetensors", "b": "good.safetensors", "c": "good.safetensors"},
    "key_not_listed": {"a": "good.safetensors"},
    "no_string": {"a": 3},
    "no_map": None,
    "empty_map": {},
}

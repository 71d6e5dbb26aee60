"""The pickle inside a PyTorch file, read without running it: dicts with `Ref`s for tensors.

A pickle is a program. It is checked opcode by opcode before it is loaded, only the four kinds of
globals that a state dict needs are known, and nothing that it is given can be changed by it.
"""

import io
import pickle
import pickletools
import struct
from typing import NamedTuple

from cnxs_jax.convert.mapped import CONVERT_HINT, DTYPES, MAX_TENSORS, fail, is_count
from cnxs_jax.errors import CheckpointError

MAX_PICKLE = 16 * 2**20
MAX_OPCODES = 50 * MAX_TENSORS  # a tensor and its name take about 35
MAX_DEPTH = 64  # a tensor in an optimizer's state in a trainer's checkpoint: 8
MAX_STACK = 3 * MAX_TENSORS  # values at once; a dict that is filled in one go: two a tensor
MAX_BITS = 64
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
ATOMS = """
    GLOBAL NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    SHORT_BINSTRING
"""
ATOMS = frozenset(ATOMS.split())
EMPTY = frozenset(("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"))
PUT, GET = frozenset(("BINPUT", "LONG_BINPUT")), frozenset(("BINGET", "LONG_BINGET"))
# How many values an opcode takes off the stack; None: all down to the last mark.
MAKE = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "BINPERSID": 1}
FILL = {"SETITEM": 2, "SETITEMS": None, "APPEND": 1, "APPENDS": None, "BUILD": 1}
DROP = frozenset(("POP", "STOP"))


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


def unpickle(data, path, reader=None):
    """The content of data.pkl with `Ref`s for tensors. Nothing of the file is executed.

    `reader`: a kind of `Restricted` for another layout. Raises CheckpointError for whatever is no
    state dict in plain containers.
    """
    check_opcodes(data, path)
    try:
        return (reader or Restricted)(io.BytesIO(data), path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a hostile pickle can make the machine fail in any way it likes
        raise fail(f"damaged pickle: {type(error).__name__} {str(error)[:80]}", path) from None


def check_opcodes(data, path):
    """Refuses opcodes beyond a state dict's, and what would exhaust the machine or its stack."""
    depths = Depths(path)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
            if count > MAX_OPCODES:
                raise fail(f"a pickle of more than {MAX_OPCODES} opcodes", path)
            # The C unpickler allocates twice the index: one opcode could ask for 64 GB.
            if opcode.name == "LONG_BINPUT" and argument > count:
                raise fail(f"the pickle stores into memo slot {argument}", path)
            # Multiples of 2**61 - 1 have one hash; a million of them as keys would take days.
            if opcode.name == "LONG1" and argument.bit_length() > MAX_BITS:
                raise fail(f"the pickle holds an integer of {argument.bit_length()} bits", path)
            depths.step(opcode.name, argument)
    except (ValueError, LookupError, struct.error) as error:
        raise fail(f"damaged pickle: {str(error)[:80]}", path, "download it again") from None


class Depths:
    """The unpickler's stack and memo with only the nesting depth of each value: 0 for an atom.

    Python hashes and compares tuples recursively on the C stack, without a limit: a deep one as a
    key ends the process. So depth is limited, and keys are atoms, since the hash of a tuple that
    holds a tuple twice, and so on, takes exponential time at any depth. Lists and dicts that grow
    after they were stored elsewhere are deeper than this knows; those are never hashed.
    """

    def __init__(self, path):
        self.path, self.stack, self.marks, self.memo = path, [], [], {}

    def step(self, name, argument):
        """Does what one opcode does. Raises LookupError where the stack or memo is empty."""
        if name in ATOMS or name in EMPTY:
            self.stack.append(int(name in EMPTY))
            if len(self.stack) > MAX_STACK:
                raise fail(f"the pickle has more than {MAX_STACK} values at once", self.path)
        elif name in PUT:
            self.memo[argument] = self.stack[-1]
        elif name in GET:
            self.stack.append(self.memo[argument])
        elif name in MAKE:
            self.push(1 + max(self.take(MAKE[name]), default=0))
        elif name in FILL:
            values = self.take(FILL[name])
            if name.startswith("SETITEM") and any(values[::2]):
                raise fail("the pickle has a dict key that is no text or number", self.path)
            self.push(max(self.stack.pop(), 1 + max(values, default=0)))
        elif name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
            if len(self.marks) > MAX_DEPTH:  # each is for a container inside of the last one's
                raise fail(f"the pickle nests values more than {MAX_DEPTH} deep", self.path)
        elif name in DROP:
            self.stack.pop()
        elif name != "PROTO":
            what = f"the pickle uses {name}, which no state dict needs"
            raise fail(what, self.path, CONVERT_HINT)

    def take(self, count):
        """The topmost `count` depths, or those above the last mark, off the stack."""
        if count is None:
            values, self.stack = self.stack, self.marks.pop()
        else:
            values = [self.stack.pop() for _ in range(count)][::-1]
        return values

    def push(self, depth):
        if depth > MAX_DEPTH:
            raise fail(f"the pickle nests values more than {MAX_DEPTH} deep", self.path)
        self.stack.append(depth)


class Restricted(pickle.Unpickler):
    """Knows tensors, storages, parameters and OrderedDict, and nothing else."""

    def __init__(self, file, path):
        super().__init__(file, encoding="utf-8")
        self.path = path

    def find_class(self, module, name):
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        function = {
            ("collections", "OrderedDict"): Entries,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        }.get((module, name))
        if function is None:
            raise fail(
                f"the pickle asks for {f'{module[:80]}.{name[:80]}'!r}; only tensors in dicts are"
                " read, nothing was executed",
                self.path,
                CONVERT_HINT,
            )
        return Function(function)

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise fail("the pickle refers to something that is no tensor storage", self.path)
        _, dtype, key, _, count = pid
        if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(key, str):
            raise fail("the pickle describes an impossible storage", self.path)
        if not is_count(count):
            raise fail("the pickle has a storage of an impossible size", self.path)
        return Storage(dtype, key, count)


class Function:
    """A function that a pickle may call. The opcode BUILD would set attributes of a plain one.

    Those would outlive the file and change how the next one is read.
    """

    __slots__ = ("function",)

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def __setstate__(self, state):
        raise ValueError("it sets attributes of a function")


class Entries(dict):
    """An OrderedDict of a pickle, made empty, and without the attributes that the pickle gives.

    `torch.save` sets `_metadata`; a hostile file could set `items`.
    """

    __slots__ = ()

    def __init__(self):
        super().__init__()

    def __setstate__(self, state):
        pass


def rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """What `torch._utils._rebuild_tensor_v2` is called with, kept for later."""
    return Ref(storage, offset, size, stride)


def rebuild_parameter(data, requires_grad=False, hooks=None):
    """A parameter is its tensor."""
    return data

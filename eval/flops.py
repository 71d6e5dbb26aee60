"""FLOPs of a program, loops included, by a walk over its HLO.

XLA's own `cost_analysis` counts the body of a loop once, so a scan over 28 blocks or 50 steps comes
out 28 or 50 times too small. Counted are matrix products and convolutions, two a multiply-add;
elementwise work is not (a few percent of these networks).

The program may be compiled or only lowered: `jax.jit(f).lower(*shapes)` of abstract values takes
seconds and no memory even where the weights would not fit the machine.
"""

import math
import re
from typing import NamedTuple

from cnxs_jax.errors import DataError

HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
ARRAY = re.compile(r"[a-z]+[0-9a-z]*\[([0-9,]*)\]")
LIBRARY = re.compile(r"cublas|cudnn|onednn|matmul", re.IGNORECASE)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
    """One line: `%name = shape opcode(operands), attributes`; `text` begins at the operands."""

    opcode: str
    shape: str
    text: str


class Computation(dict):
    """{name: Instruction} in order, and the name of its root."""

    root = None


def count(program):
    """FLOPs of one run of `jax.jit(f).lower(...)` or of that `.compile()`d.

    Raises DataError for what cannot be counted: a loop whose number of trips is not known, a
    product that XLA hands to a library (cuBLAS, cuDNN, oneDNN).
    """
    return count_text(text_of(program))


def text_of(program):
    """The HLO of a compiled or lowered program."""
    compiled = hasattr(program, "memory_analysis")
    return program.as_text() if compiled else program.as_text(dialect="hlo")


def count_text(hlo, products=None):
    """The same of HLO as text.

    Args:
        products: {"dot": f, "convolution": f} to add up something else of each product than its
            FLOPs, loops times their trips; functions as those of COSTS.
    """
    computations, entry = parse(hlo)
    costs, known = COSTS | (products or {}), {}

    def total(name):
        if name not in known:
            inside = computations[name]
            found = [i for i in inside.values() if i.opcode in costs]
            known[name] = sum(costs[i.opcode](i, inside, total, computations) for i in found)
        return known[name]

    return total(entry)


def parse(hlo):
    """`({name: Computation}, name of the entry)`."""
    computations, entry, current = {}, None, None
    for line in hlo.splitlines():
        head = HEAD.match(line)
        if head and not line.startswith(" "):
            current = computations[head[2]] = Computation()
            entry = head[2] if head[1] else entry
            continue
        found = LINE.match(line)
        if not found or current is None:
            continue
        root, name, shape, opcode, text = found.groups()
        current[name] = Instruction(opcode, shape, text)
        current.root = name if root else current.root
    if entry is None:
        raise DataError("no ENTRY computation in this HLO", "eval.flops")
    return computations, entry


def dimensions(shape):
    """The sizes of the first array in a shape's text; () for a scalar or an empty tuple."""
    found = ARRAY.search(shape)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()


def names(text):
    """The operands' names in `... %a, f32[2] %b), attribute=...`; lowered programs have no `%`."""
    inside = text.split(")", 1)[0]
    return re.findall(r"%([\w.\-]+)" if "%" in inside else r"[\w.\-]+", inside)


def attribute(text, name):
    """`name=%computation` -> computation."""
    return re.search(rf"\b{name}=%?([\w.\-]+)", text)[1]


# What an opcode costs: (instruction, its computation, FLOPs of a computation, all computations).


def dot(op, inside, total, computations):
    left = dimensions(inside[names(op.text)[0]].shape)
    axes = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", op.text)
    summed = math.prod(left[int(a)] for a in (axes[1] if axes else "").split(",") if a)
    return 2 * math.prod(dimensions(op.shape)) * summed


def convolution(op, inside, total, computations):
    """A dilated input (the gradient of a stride) counts only where it is not zero."""
    kernel = dimensions(inside[names(op.text)[1]].shape)
    labels = re.search(r"dim_labels=\w+_(\w+)->", op.text)[1]
    taps = math.prod(n for n, label in zip(kernel, labels, strict=True) if label != "o")
    dilation = re.search(r"lhs_dilate=([0-9x]+)", op.text)
    zeros = math.prod(int(n) for n in dilation[1].split("x")) if dilation else 1
    return 2 * math.prod(dimensions(op.shape)) * taps / zeros


def loop(op, inside, total, computations):
    each = total(attribute(op.text, "body"))
    if not each:
        return 0
    known = TRIPS.search(op.text)
    trips = int(known[1]) if known else trip_count(op, inside, computations)
    if trips is None:
        raise DataError("a loop of unknown length", "eval.flops", "count a program of known length")
    return trips * each


def trip_count(op, inside, computations):
    """Trips of a lowered loop `for (i = first; i < last; i++)`, None for any other."""
    condition = computations[attribute(op.text, "condition")]
    body = computations[attribute(op.text, "body")]
    test = condition[condition.root]
    if test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    counter, last = names(test.text)[:2]
    index = re.search(r"\bindex=(\d+)", condition[counter].text)
    if condition[counter].opcode != "get-tuple-element" or not index:
        return None
    slot = int(index[1])
    first, step = (_slot(c, name, slot) for c, name in (
        (inside, names(op.text)[0]), (body, body.root)))  # fmt: skip
    last, first = _constant(condition, last), _constant(inside, first)
    if last is None or first is None or step is None or body[step].opcode != "add":
        return None
    by_one = 1 in [_constant(body, name) for name in names(body[step].text)]
    return max(last - first, 0) if by_one else None


def _slot(computation, name, slot):
    """The name of what stands in one place of a tuple, None where it is no tuple."""
    made = computation[name]
    return names(made.text)[slot] if made.opcode == "tuple" else None


def _constant(computation, name):
    """The integer that a name stands for, or None."""
    made = computation.get(name)
    found = made and made.opcode == "constant" and re.match(r"-?\d+", made.text)
    return int(found[0]) if found else None


def call(op, inside, total, computations):
    return total(attribute(op.text, "calls" if "calls=" in op.text else "to_apply"))


def library(op, inside, total, computations):
    """Products inside a call of a library are refused, so that a count is never too small."""
    target = re.search(r'custom_call_target="([^"]*)"', op.text)
    if target and LIBRARY.search(target[1]):
        fix = "compile with XLA's own kernels, or use a closed form"
        raise DataError(f"products inside {target[1]}", "eval.flops", fix)
    return 0


def branch(op, inside, total, computations):
    """The dearest branch."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", op.text)
    found = (
        re.findall(r"[\w.\-]+", listed[1])
        if listed
        else [attribute(op.text, "true_computation"), attribute(op.text, "false_computation")]
    )
    return max(total(name) for name in found)


COSTS = {
    "dot": dot, "convolution": convolution, "while": loop, "fusion": call, "call": call,
    "conditional": branch, "custom-call": library,
}  # fmt: skip

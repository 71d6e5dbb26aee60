"""FLOPs of a compiled program, loops included, by a walk over its HLO.

XLA's own `cost_analysis` counts the body of a loop once, so a scan over 28 blocks or 50 steps comes
out 28 or 50 times too small. Counted are matrix products and convolutions, two a multiply-add;
elementwise work is not (a few percent of these networks).
"""

import math
import re

from cnxs_jax.errors import DataError

HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
ARRAY = re.compile(r"[a-z]+[0-9a-z]*\[([0-9,]*)\]")
LIBRARY = re.compile(r"cublas|cudnn|onednn|matmul", re.IGNORECASE)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def count(compiled):
    """FLOPs of one run of `jax.jit(f).lower(...).compile()`.

    Raises DataError for what cannot be counted: a loop whose number of trips XLA does not know, a
    product that XLA hands to a library (cuBLAS, cuDNN, oneDNN).
    """
    return count_text(compiled.as_text())


def count_text(hlo):
    """The same of optimised HLO as text."""
    computations, entry = parse(hlo)
    known = {}

    def total(name):
        if name not in known:
            known[name] = sum(cost(*op, total) for op in computations[name])
        return known[name]

    return total(entry)


def parse(hlo):
    """`({computation: [(opcode, shape, operand shapes, text), ...]}, name of the entry)`."""
    computations, entry, current, shapes = {}, None, None, {}
    for line in hlo.splitlines():
        head = HEAD.match(line)
        if head and not line.startswith(" "):
            current, shapes = head[2], {}
            computations[current] = []
            entry = current if head[1] else entry
            continue
        found = LINE.match(line)
        if not found or current is None:
            continue
        name, shape, opcode, rest = found.groups()
        shapes[name] = dimensions(shape)
        if opcode in COSTS:
            operands = [shapes[n] for n in names(rest)]
            computations[current].append((opcode, shapes[name], operands, rest))
    if entry is None:
        raise DataError("no ENTRY computation in this HLO", "eval.flops")
    return computations, entry


def dimensions(shape):
    """The sizes of the first array in a shape's text; () for a scalar or an empty tuple."""
    found = ARRAY.search(shape)
    return tuple(int(n) for n in found[1].split(",") if n) if found else ()


def names(rest):
    """The operands' names in `... %a, f32[2] %b), attribute=...`."""
    inside = rest.split(")", 1)[0]
    return re.findall(r"%([\w.\-]+)", inside)


def cost(opcode, shape, operands, text, total):
    """FLOPs of one instruction; `total(name)` gives those of a computation that it calls."""
    return COSTS[opcode](shape, operands, text, total)


def attribute(text, name):
    """`name=%computation` -> computation."""
    return re.search(rf"\b{name}=%?([\w.\-]+)", text)[1]


def dot(shape, operands, text, total):
    axes = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", text)[1]
    summed = math.prod(operands[0][int(a)] for a in axes.split(",") if a)
    return 2 * math.prod(shape) * summed


def convolution(shape, operands, text, total):
    """A dilated input (the gradient of a stride) counts only where it is not zero."""
    labels = re.search(r"dim_labels=\w+_(\w+)->", text)[1]
    taps = math.prod(n for n, label in zip(operands[1], labels, strict=True) if label != "o")
    dilation = re.search(r"lhs_dilate=([0-9x]+)", text)
    zeros = math.prod(int(n) for n in dilation[1].split("x")) if dilation else 1
    return 2 * math.prod(shape) * taps / zeros


def loop(shape, operands, text, total):
    inside = total(attribute(text, "body"))
    if not inside:
        return 0
    trips = TRIPS.search(text)
    if trips is None:
        raise DataError("a loop of unknown length", "eval.flops", "count a program of known length")
    return int(trips[1]) * inside


def call(shape, operands, text, total):
    return total(attribute(text, "calls" if "calls=" in text else "to_apply"))


def library(shape, operands, text, total):
    """Products inside a call of a library are refused, so that a count is never too small."""
    target = re.search(r'custom_call_target="([^"]*)"', text)
    if target and LIBRARY.search(target[1]):
        fix = "compile with XLA's own kernels, or use a closed form"
        raise DataError(f"products inside {target[1]}", "eval.flops", fix)
    return 0


def branch(shape, operands, text, total):
    """The dearest branch."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", text)
    found = (
        re.findall(r"[\w.\-]+", listed[1])
        if listed
        else [attribute(text, "true_computation"), attribute(text, "false_computation")]
    )
    return max(total(name) for name in found)


COSTS = {
    "dot": dot, "convolution": convolution, "while": loop, "fusion": call, "call": call,
    "conditional": branch, "custom-call": library,
}  # fmt: skip

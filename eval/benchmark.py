r"""`python -m eval.benchmark`: this project and PyTorch, the same weights, side by side.

Both run in one process, interleaved, so that a noisy machine disturbs both alike; medians of
several repeats, compilation reported apart, and a matrix product timed in the same run as the
ceiling. FLOPs are counted in our compiled programs (`eval.flops`); the closed form stands beside
them as the check. Writes `benchmark.json` and `benchmark.md` to `--out`. The weights are random: no
speed depends on their values. The cases are in `eval.benchmark_cases`.

  python -m eval.benchmark --case=pixart_xl_512 --out=runs/benchmark      # needs `.[test]`, 8 GB
  python -m eval.benchmark --case=lcd_step_xl_512 --size=tiny             # seconds
"""

import contextlib
import ctypes
import dataclasses
import gc
import platform
import statistics
import time
from pathlib import Path

import numpy as np
from absl import flags

from cnxs_jax import errors
from cnxs_jax.storage import check_directory, write_json, write_text
from eval import benchmark_start, flops
from eval.benchmark_case import to_numpy, torch_device
from eval.benchmark_cases import CASES

CASE = flags.DEFINE_enum("case", "pixart_xl_512", list(CASES), "What to time.")
SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "The published widths, or seconds.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of both sides.")
COMPILE = flags.DEFINE_bool("compile", False, "Time diffusers with torch.compile, too.")
STARTUP = flags.DEFINE_bool("startup", False, "Time two fresh starts with a compilation cache.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repeats of each program.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 4, "Steps of the sampling loop.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Directory of benchmark.json and benchmark.md.")

OURS, THEIRS, COMPILED = "cnxs_jax", "diffusers", "diffusers compiled"


@dataclasses.dataclass
class Program:
    """One thing to time on every side; the functions block until their result is there.

    Attributes:
        sides: {side: function without arguments}, ours first.
        flops: counted in our compiled program (None: `count`), `closed_form` by hand.
        reserved: bytes that our program allocates by XLA's own account, None where not asked.
    """

    name: str
    sides: dict
    flops: float | None
    closed_form: float
    reserved: int | None = None


def programs_of(case, compiled_side=False):
    """`(programs, seconds of compilation, {side: largest difference})` of a case."""
    import torch

    model = case.torch_model()
    params = case.params(model)
    started = time.perf_counter()
    compiled = {name: lowered.compile() for name, lowered in case.lower(params).items()}
    seconds = time.perf_counter() - started
    model = case.torch_ready(model)
    sides = {OURS: case.runners(compiled, params), THEIRS: case.theirs(model)}
    if compiled_side:
        sides[COMPILED] = case.theirs(model, torch.compile)
    del model, params
    gc.collect()
    different = differences(sides, case.compared, case.calls)
    programs = []
    for name, (_, closed) in case.functions().items():
        each = {side: finished(runs[name]) for side, runs in sides.items()}
        own = compiled[name]
        programs.append(Program(name, each, count(own), closed, reserved(own)))
    return programs, seconds, different


def differences(sides, compared, calls):
    """{side: largest difference to ours} of the compared programs, in parts of the largest value.

    A later call of a train step shows what the earlier ones changed.
    """
    found = dict.fromkeys(list(sides)[1:], 0.0)
    for name in compared:
        for _ in range(calls):
            a, *others = (to_numpy(runs[name]()) for runs in sides.values())
            for side, b in zip(found, others, strict=True):
                # Losses and norms each in parts of themselves, pictures of their largest value.
                scale = np.abs(b) if b.ndim == 1 else np.abs(b).max()
                found[side] = max(found[side], float((np.abs(a - b) / scale).max()))
    return found


def finished(run):
    """`run` until its result is there, on a GPU, too."""
    import torch

    def waited():
        run()
        if torch_device() == "cuda":
            torch.cuda.synchronize()

    return waited


def reserved(compiled):
    """Bytes that a compiled program allocates beside its arguments, None where XLA does not say."""
    try:
        found = compiled.memory_analysis()
        total = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    except (AttributeError, NotImplementedError):
        return None
    return max(int(total), 0)


def count(compiled):
    """FLOPs of a compiled program, or None where a library computes its products (GPUs)."""
    try:
        return flops.count(compiled)
    except errors.DataError as error:
        print(f"not counted: {error}")
        return None


def matrix_product(size, dtype="float32"):
    """The ceiling: one matrix product on both sides."""
    import jax
    import jax.numpy as jnp
    import torch

    a = torch.ones(size, size, device=torch_device(), dtype=getattr(torch, dtype))
    b = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(b, b).compile()
    sides = {
        OURS: lambda: jax.block_until_ready(product(b, b)),
        THEIRS: lambda: float((a @ a)[0, 0]),
    }
    return Program(f"matrix product {size}", sides, count(product), 2.0 * size**3)


def measure(programs, repeats):
    """Rows of medians; every repeat runs each program on all its sides, the order turning."""
    times = {p.name: {side: [] for side in p.sides} for p in programs}
    memory = {p.name: peaks(p) for p in programs}  # the warm-up, too
    for repeat in range(repeats):
        for p in programs:
            sides = list(p.sides)
            turn = repeat % len(sides)
            for side in sides[turn:] + sides[:turn]:
                started = time.perf_counter()
                p.sides[side]()
                times[p.name][side].append(time.perf_counter() - started)
    rows = [row_of(p, times[p.name], memory[p.name]) for p in programs]
    ceiling = rows[0]
    for row in rows[1:]:
        for side in (OURS, THEIRS):
            row[f"{side} of ceiling"] = row[f"{side} GFLOP/s"] / ceiling[f"{side} GFLOP/s"]
    return rows


def row_of(p, times, memory):
    """One line: medians of the seconds of each side, and the ratios of ours to the others."""
    work = p.closed_form if p.flops is None else p.flops
    row = {
        "program": p.name,
        "GFLOP": "not counted" if p.flops is None else p.flops / 1e9,
        "GFLOP closed form": p.closed_form / 1e9,
    }
    row |= {f"{side} s": statistics.median(values) for side, values in times.items()}
    for side in list(times)[1:]:
        ratios = [a / b for a, b in zip(times[OURS], times[side], strict=True)]
        name = "ratio" if side == THEIRS else "ratio to compiled"
        row |= {name: statistics.median(ratios)}
        row |= {f"{name} min": min(ratios), f"{name} max": max(ratios)}
    row |= {f"{side} GFLOP/s": work / statistics.median(v) / 1e9 for side, v in times.items()}
    row |= {
        f"{side} peak MiB": "not measured" if m is None else m / 2**20 for side, m in memory.items()
    }
    return row


def peaks(program):
    """{side: bytes that one call adds, at most}; each side runs once.

    On a CPU it is measured. On CUDA PyTorch's side is its allocator's count and ours what XLA
    reserves for the program, since its own high-water mark cannot be set back.
    """
    import jax

    if jax.default_backend() == "cpu":
        return {side: peak_memory(run) for side, run in program.sides.items()}
    found = {}
    for side, run in program.sides.items():
        found[side] = program.reserved if side == OURS else None
        if side != OURS and torch_device() == "cuda":
            found[side] = _cuda_peak(run)
        else:
            run()
    return found


def _cuda_peak(run):
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def peak_memory(run):
    """Bytes that one call adds to what the process holds, at most; None where it cannot be known.

    Weights are held before. It is the kernel's high-water mark of this process.
    """
    status, mark = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier call freed and the allocator kept
        mark.write_text("5")  # the high-water mark falls to what is held now
        before = _kilobytes(status, "VmRSS")
        run()
        return max(_kilobytes(status, "VmHWM") - before, 0) * 1024
    except (OSError, StopIteration, AttributeError):  # no Linux, or another C library
        run()
        return None


def _kilobytes(status, key):
    return next(int(s.split()[1]) for s in status.read_text().splitlines() if s.startswith(key))


def markdown(rows, facts):
    """The table, and below it what was measured on."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        values = [row.get(c, "-") for c in columns]
        cells = [v if isinstance(v, str) else f"{v:.3g}" for v in values]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {k}: {v}" for k, v in facts.items()), ""])


def run(name, size="full", repeats=5, steps=4, dtype="float32", compiled=False, startup=False):
    """`(rows, facts)` of one case: the table, and what it was measured on.

    Args:
        compiled: time diffusers with `torch.compile`, too.
        startup: time two fresh processes of our programs with a compilation cache.
    """
    import diffusers
    import jax
    import torch

    # A GPU would take our float32 products, and PyTorch's convolutions, in fewer digits.
    exact = dtype == "float32" and jax.default_backend() == "gpu"
    torch.backends.cudnn.allow_tf32 = False
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        case = CASES[name](size, steps, dtype)
        programs, compiling, different = programs_of(case, compiled)
        # On an accelerator a small product is over before the next one is sent.
        side = 256 if size != "full" else 2048 if jax.default_backend() == "cpu" else 16384
        rows = measure([matrix_product(side, dtype), *programs], repeats)
    reduced = f", {case.reduced}" if case.reduced and size == "full" else ""
    facts = {
        "case": f"{name}, {size}{reduced}, batch {case.batch}, {dtype}, {repeats} repeats",
        "device": f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads; PyTorch on {torch_device()}",
        "versions": f"jax {jax.__version__}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}",
        "compilation": f"{compiling:.1f} s for all of our programs, not in the times",
        "FLOPs": "of our programs, on both sides: diffusers reads text and control picture anew in "
        "every step, our loop once; on a CPU ours computes a convolution after a doubling with 4/9 "
        "of the products",
        "peak": "memory that a call adds to weights and inputs, in this process",
    }
    for side, value in different.items():
        facts[f"largest difference to {side}"] = f"{value:.1e} ({', '.join(case.compared)})"
    if startup:
        facts |= benchmark_start.facts(name, size, steps, dtype)
    return rows, facts


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    if OUT.value:
        check_directory(OUT.value, "--out")
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise errors.ConfigError(
            f"the other side is missing: {error}", "eval.benchmark", "pip install -e '.[test]'"
        ) from None
    rows, facts = run(
        CASE.value, SIZE.value, REPEATS.value, STEPS.value, DTYPE.value, COMPILE.value,
        STARTUP.value,
    )  # fmt: skip
    text = markdown(rows, facts)
    print(text)
    if OUT.value:
        out = Path(OUT.value)
        write_json(out / "benchmark.json", {"rows": rows, "facts": facts}, sort_keys=False)
        write_text(out / "benchmark.md", text)
    return 0


if __name__ == "__main__":
    errors.run_app(main)

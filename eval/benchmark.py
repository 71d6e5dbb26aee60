r"""`python -m eval.benchmark`: this project and PyTorch, the same weights, side by side.

Both run in one process, interleaved, so that a noisy machine disturbs both alike; medians of
several repeats, compilation reported apart, and a matrix product timed in the same run as the
ceiling. FLOPs are counted in our compiled programs (`eval.flops`); the closed form stands beside
them as the check. Writes `benchmark.json` and `benchmark.md` to `--out`. The weights are random: no
speed depends on their values. The cases are in `eval.benchmark_cases`.

  python -m eval.benchmark --case=pixart_xl_512 --out=runs/benchmark      # needs `.[test]`, 8 GB
  python -m eval.benchmark --case=lcd_step_xl_512 --size=tiny             # seconds
"""

import dataclasses
import gc
import platform
import statistics
import time
from pathlib import Path

from absl import flags

from cnxs_jax import errors
from cnxs_jax.storage import write_json, write_text
from eval import flops
from eval.benchmark_case import torch_device
from eval.benchmark_cases import CASES

CASE = flags.DEFINE_enum("case", "pixart_xl_512", list(CASES), "What to time.")
SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "The published widths, or seconds.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repeats of each program.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 4, "Steps of the sampling loop.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Directory of benchmark.json and benchmark.md.")


@dataclasses.dataclass
class Program:
    """One thing to time on both sides; both functions block until their result is there.

    `flops` is counted in our compiled program (None: `count`), `closed_form` by hand.
    """

    name: str
    ours: object
    theirs: object
    flops: float | None
    closed_form: float


def programs_of(case):
    """`(programs, seconds of compilation, the largest difference or None)` of a case."""
    import jax
    import numpy as np

    model = case.torch_model()
    params = case.params(model)
    started = time.perf_counter()
    compiled = {name: lowered.compile() for name, lowered in case.lower(params).items()}
    seconds = time.perf_counter() - started
    ours = case.runners(compiled, params)
    theirs = case.theirs(model.to(torch_device()))
    del model, params
    gc.collect()
    programs = [
        Program(name, ours[name], theirs[name], count(compiled[name]), closed)
        for name, (_, closed) in case.functions().items()
    ]
    difference = None
    if case.compared:
        a, b = np.asarray(jax.device_get(ours[case.compared]())), theirs[case.compared]()
        difference = float(np.abs(a - b).max() / np.abs(b).max())
    return programs, seconds, difference


def count(compiled):
    """FLOPs of a compiled program, or None where a library computes its products (GPUs)."""
    try:
        return flops.count(compiled)
    except errors.DataError as error:
        print(f"not counted: {error}")
        return None


def matrix_product(size):
    """The ceiling: one float32 matrix product on both sides."""
    import jax
    import jax.numpy as jnp
    import torch

    a = torch.ones(size, size, device=torch_device())
    b = jnp.ones((size, size))
    product = jax.jit(jnp.matmul).lower(b, b).compile()
    return Program(
        f"matrix product {size}",
        lambda: jax.block_until_ready(product(b, b)),
        lambda: float((a @ a)[0, 0]),
        count(product),
        2.0 * size**3,
    )


def measure(programs, repeats):
    """Rows of medians; every repeat runs each program on both sides, the order alternating."""
    times = {p.name: {"ours": [], "theirs": []} for p in programs}
    memory = {p.name: (peak_memory(p.ours), peak_memory(p.theirs)) for p in programs}  # warm-up
    for repeat in range(repeats):
        for p in programs:
            order = ("ours", "theirs") if repeat % 2 == 0 else ("theirs", "ours")
            for side in order:
                started = time.perf_counter()
                getattr(p, side)()
                times[p.name][side].append(time.perf_counter() - started)
    rows = []
    for p in programs:
        ours, theirs = (times[p.name][s] for s in ("ours", "theirs"))
        work = p.closed_form if p.flops is None else p.flops
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        peaks = ["not measured" if m is None else m / 2**20 for m in memory[p.name]]
        rows.append(
            {
                "program": p.name,
                "GFLOP": "not counted" if p.flops is None else p.flops / 1e9,
                "GFLOP closed form": p.closed_form / 1e9,
                "cnxs_jax s": statistics.median(ours),
                "diffusers s": statistics.median(theirs),
                "ratio": statistics.median(ratios),
                "ratio min": min(ratios),
                "ratio max": max(ratios),
                "cnxs_jax GFLOP/s": work / statistics.median(ours) / 1e9,
                "diffusers GFLOP/s": work / statistics.median(theirs) / 1e9,
                "cnxs_jax peak MiB": peaks[0],
                "diffusers peak MiB": peaks[1],
            }
        )
    ceiling = rows[0]
    for row in rows[1:]:
        for side in ("cnxs_jax", "diffusers"):
            row[f"{side} of ceiling"] = row[f"{side} GFLOP/s"] / ceiling[f"{side} GFLOP/s"]
    return rows


def peak_memory(run):
    """Bytes that one call adds to what the process holds, at most; None where it cannot be known.

    Weights are held before. On a CPU it is the kernel's high-water mark of this process, and on
    CUDA PyTorch's own count for its side; XLA's cannot be set back, so that it is not measured.
    """
    import jax

    status, mark = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        if jax.default_backend() != "cpu":
            raise OSError
        mark.write_text("5")  # the high-water mark falls to what is held now
        before = _kilobytes(status, "VmRSS")
        run()
        return max(_kilobytes(status, "VmHWM") - before, 0) * 1024
    except (OSError, StopIteration):
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


def run(name, size="full", repeats=5, steps=4):
    """`(rows, facts)` of one case: the table, and what it was measured on."""
    import diffusers
    import jax
    import torch

    case = CASES[name](size, steps)
    programs, compiling, difference = programs_of(case)
    rows = measure([matrix_product(2048 if size == "full" else 256), *programs], repeats)
    reduced = f", {case.reduced}" if case.reduced and size == "full" else ""
    facts = {
        "case": f"{name}, {size}{reduced}, batch 1, float32, {repeats} repeats",
        "device": f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads; PyTorch on {torch_device()}",
        "versions": f"jax {jax.__version__}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}",
        "compilation": f"{compiling:.1f} s for all of our programs, not in the times",
        "FLOPs": "of our programs, on both sides: diffusers reads the text anew in every step, our "
        "loop once; on a CPU ours computes a convolution after a doubling with 4/9 of the products",
        "peak": "memory that a call adds to weights and inputs, in this process",
    }
    if difference is not None:
        facts["largest difference of one evaluation"] = f"{difference:.1e}"
    return rows, facts


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    try:
        import diffusers  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise errors.ConfigError(
            f"the other side is missing: {error}", "eval.benchmark", "pip install -e '.[test]'"
        ) from None
    rows, facts = run(CASE.value, SIZE.value, REPEATS.value, STEPS.value)
    text = markdown(rows, facts)
    print(text)
    if OUT.value:
        out = Path(OUT.value)
        write_json(out / "benchmark.json", {"rows": rows, "facts": facts}, sort_keys=False)
        write_text(out / "benchmark.md", text)
    return 0


if __name__ == "__main__":
    errors.run_app(main)

"""How long a second start takes: two fresh processes of one case with one compilation cache.

The first one fills the cache, the second one finds its programs there. Each process imports, builds
the network, traces, compiles and runs the first program once on weights of zeros, so that neither
PyTorch nor files count. `python -m eval.benchmark --startup` adds the figures to its own.

  python -m eval.benchmark_start --case=unet_sd15_512 --size=tiny
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time

from absl import flags

from cnxs_jax import errors

STARTED = time.perf_counter()  # the heavy imports come later
PARTS = ("import and build", "trace", "compile", "first call")


def facts(name, size="full", steps=4, dtype="float32"):
    """{"first start": text, "second start": text}: seconds of two processes, and of their parts."""
    command = [sys.executable, "-m", "eval.benchmark_start", f"--case={name}", f"--size={size}"]
    command += [f"--steps={steps}", f"--dtype={dtype}", "--once"]
    with tempfile.TemporaryDirectory() as cache:
        own = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        found = {}
        for run in ("first start", "second start, with the compilation cache"):
            started = time.perf_counter()
            done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
            seconds = time.perf_counter() - started
            if done.returncode:
                raise errors.DataError(f"the start failed: {done.stderr[-500:]}", "--startup")
            parts = json.loads(done.stdout.splitlines()[-1])
            told = ", ".join(f"{part} {parts[part]:.2f}" for part in PARTS)
            found[run] = f"{seconds:.2f} s ({told})"
    return found


def once(name, size, steps, dtype):
    """{part of PARTS: seconds} of this process, whose first program runs once."""
    import jax
    import jax.numpy as jnp

    from eval.benchmark_cases import CASES

    case = CASES[name](size, steps, dtype)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), case.abstract())
    marks = [STARTED, time.perf_counter()]
    program = next(iter(case.functions()))
    lowered = case.lower(params, only=program)[program]
    marks.append(time.perf_counter())
    compiled = {program: lowered.compile()}
    marks.append(time.perf_counter())
    case.runners(compiled, params)[program]()
    marks.append(time.perf_counter())
    spans = (b - a for a, b in itertools.pairwise(marks))
    return dict(zip(PARTS, spans, strict=True))


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    from eval.benchmark_cases import CASES

    if CASE.value not in CASES:
        what = f"unknown case {CASE.value!r}.{errors.did_you_mean(CASE.value, CASES)}"
        raise errors.ConfigError(what, "--case", f"one of {', '.join(CASES)}")
    given = CASE.value, SIZE.value, STEPS.value, DTYPE.value
    if ONCE.value:
        print(json.dumps(once(*given)))
        return 0
    for run, text in facts(*given).items():
        print(f"{run}: {text}")
    return 0


if __name__ == "__main__":
    CASE = flags.DEFINE_string("case", "pixart_xl_512", "A case of eval.benchmark.")
    SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "As of eval.benchmark.")
    DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the weights.")
    STEPS = flags.DEFINE_integer("steps", 4, "Steps of the sampling loop.", lower_bound=1)
    ONCE = flags.DEFINE_bool("once", False, "This process alone, and print JSON.")
    errors.run_app(main)

"""Eight simulated devices, strict rank promotion, a compilation cache, and quick compilation.

Most of the suite's time is LLVM's: its lowest optimisation level halves it. `XLA_FLAGS` with a
level of its own, or the name of a file of flags, wins. `checks.record` notes which it was.
"""

import gc
import os
import pathlib
import warnings

import jax
import pytest

LEVEL = "--xla_backend_optimization_level"
given = os.environ.get("XLA_FLAGS", "").strip()  # read when the first device is asked for
if LEVEL not in given and given[:1] in ("", "-"):  # else it names a file
    os.environ["XLA_FLAGS"] = f"{given} {LEVEL}=0".strip()  # subprocesses too

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE / "cnxs_jax" / "xla")  # subprocesses too
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# tqdm and tensorboardX warn about things that are theirs
warnings.filterwarnings("ignore", category=DeprecationWarning, module="tensorboardX")

MAPS, MOST = pathlib.Path("/proc/self/maps"), 40_000


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Drops compiled programs once they are many.

    Linux lets a process map 65,530 pieces of memory and each program takes some: all tests in one
    process would take more than there are, and such a run has crashed in XLA's compiler.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST:
        jax.clear_caches()
        gc.collect()

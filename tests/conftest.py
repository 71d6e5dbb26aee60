"""Eight simulated devices for every test and a compilation cache."""

import os
import pathlib
import warnings

import jax

jax.config.update("jax_num_cpu_devices", 8)

_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE / "cnxs_jax" / "xla")  # subprocesses too
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# tqdm and tensorboardX warn about things that are theirs
warnings.filterwarnings("ignore", category=DeprecationWarning, module="tensorboardX")

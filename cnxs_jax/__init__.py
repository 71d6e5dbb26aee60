"""cnxs_jax: fast, controllable, expert text-to-image in JAX.

`import cnxs_jax` loads neither jax, torch, TensorFlow nor transformers: the names below are
imported where they are first used.
"""

__version__ = "0.1.0"

_PUBLIC = {
    "load_model": "cnxs_jax.pipelines.load",
    "load_pipeline": "cnxs_jax.pipelines.pipeline",
    "save_pipeline": "cnxs_jax.pipelines.pipeline",
}


def __getattr__(name):
    import importlib

    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in ("control", "convert", "data", "diffusion", "lora", "models", "pipelines"):
        return importlib.import_module(f"cnxs_jax.{name}")
    raise AttributeError(f"module 'cnxs_jax' has no attribute {name!r}")

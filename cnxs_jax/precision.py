"""How precisely matrix products are taken: `with precision.matmul("auto"): ...`.

The names are those of `jax.default_matmul_precision`. On a CPU "bfloat16" reaches the tile units of
recent x86 cores (`cnxs_jax.models.layers`); "auto" takes it where it is measurably faster.
"""

import contextlib
import functools
import time

import jax
import jax.numpy as jnp

PRECISIONS = ("auto", "float32", "bfloat16")
FASTER = 1.5  # "auto" gives up digits for no less
SIDE, TRIES = 1024, 3


def resolve(name):
    """What "auto" is on this machine, "bfloat16" or None (JAX's default); other names stay.

    The answer depends on a clock, so a run asks once and keeps it: see `train.loop.Fit`.
    """
    if name == "auto":
        return "bfloat16" if bfloat16_is_faster() else None
    return name


def matmul(name):
    """A context in which functions are traced with this precision; None leaves JAX's default."""
    name = resolve(name)
    return contextlib.nullcontext() if name is None else jax.default_matmul_precision(name)


@functools.cache
def bfloat16_is_faster():
    """Whether this CPU multiplies bfloat16 much faster than float32; False on other backends.

    Those have their own defaults (a TPU takes bfloat16 anyway). False with several processes, too:
    their clocks may disagree, and all must run the same program.
    """
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return False
    return _seconds(jnp.float32) > FASTER * _seconds(jnp.bfloat16)


def _seconds(dtype):
    """The best time of a product of two matrices of SIDE x SIDE, with a float32 sum."""
    a = jnp.ones((SIDE, SIDE), dtype)
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(a, a))  # compiled here
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        times.append(time.perf_counter() - start)
    return min(times)

"""For which kind of machine a program is traced: the default backend, or an assumed one.

Some forms are chosen by backend when a program is traced (`layers.Dense`, `conv`, `attention`). A
planner on a CPU must see the forms of the machine that it plans for.
"""

import contextlib
import contextvars

import jax

# An accelerator of no make: the plain forms, and attention in blocks, whose memory is that of the
# fused kernels. Its programs compile on every backend.
ACCELERATOR = "accelerator"

_assumed = contextvars.ContextVar("assumed_backend", default=None)


def current():
    """ "cpu", "gpu", "tpu", or what `assume` says."""
    return _assumed.get() or jax.default_backend()


@contextlib.contextmanager
def assume(name):
    """Programs that are traced inside take the forms of `name`.

    jit does not know of it: trace functions that have not been traced before.
    """
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)

"""Parameters that are cheap to trace."""

import functools

import jax
from flax import errors


@functools.cache
def _traced_once(init):
    """The initialiser as one program a shape; unjitted, each of its operations is compiled."""
    return jax.jit(init, static_argnames=("shape", "dtype"))


def parameter(module, name, init, shape):
    """`module.param(name, init, shape)`, of an initialiser that lives as long as the process.

    Flax asks every initialiser for its shape whenever a network is traced, which takes longer than
    many a layer; here the shape alone is compared.

    Raises:
        flax.errors.ScopeParamShapeError: there is one of another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, _traced_once(init), shape)
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise errors.ScopeParamShapeError(name, module.scope.path_text, value.shape, shape)
    return value

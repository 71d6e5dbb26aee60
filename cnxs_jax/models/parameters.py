"""Parameters that are cheap to trace."""

import functools

import jax
from flax import errors
from flax.core import meta


@functools.cache
def _traced_once(init):
    """The initialiser as one program a shape; unjitted, each of its operations is compiled."""
    return jax.jit(lambda key, shape: init(key, shape), static_argnums=1)


def parameter(module, name, init, shape):
    """`module.param(name, init, shape)`, but a name that is used twice is not refused.

    Flax asks every initialiser for its shape whenever a network is traced, which takes longer than
    many a layer; here the shape alone is compared.

    Args:
        init: kept for the life of the process; make it once and not a call.

    Raises:
        flax.errors.ScopeParamShapeError: there is one of another shape.
        flax.errors.ScopeParamNotFoundError: there are parameters, but not this one.
    """
    if not module.has_variable("params", name):
        return module.param(name, _traced_once(init), shape)
    value = meta.unbox(module.get_variable("params", name))
    if value.shape != shape:
        raise errors.ScopeParamShapeError(name, module.scope.path_text, value.shape, shape)
    return value

"""The factors that `cond` holds for controllers, and the batch of their pictures, checked."""

import numpy as np

from cnxs_jax.errors import ConfigError


def read(cond, key, count, several, shape):
    """`cond[key]` of each of `count` adapters, a tuple; None where there is none.

    Args:
        several: whether the value is a tuple, one an adapter.
        shape: of each, batch first; a batch of 1 serves all.

    Raises ConfigError for another number of values or other shapes.
    """
    value = cond.get(key)
    if value is None:
        return (None,) * count
    where, is_tuple = f'cond["{key}"]', isinstance(value, tuple | list)
    values = tuple(value) if is_tuple else (value,)
    if is_tuple != several or len(values) != count:
        what = f"{len(values)} values for {count} adapters"
        raise ConfigError(what, where, "a tuple only for several adapters")
    for one in values:
        given = np.shape(one)
        if one is not None and given not in (shape, (1, *shape[1:])):
            rest = " and connection (encoder stages, the middle, decoder stages)"
            fix = f"give one number an image{rest if shape[1:] else ''}"
            raise ConfigError(f"shape {list(given)}, expected {list(shape)}", where, fix)
    return values


def check_batch(hint, batch):
    """Raises ConfigError unless there is one picture, or one an image."""
    if hint.shape[0] not in (1, batch):
        what = f"a hint of batch {hint.shape[0]} for latents of batch {batch}"
        raise ConfigError(what, 'cond["hint"]', "give one control image, or one an image")

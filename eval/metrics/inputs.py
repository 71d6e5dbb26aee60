"""What the metrics accept, refused in one way: features, pictures, and maps over pictures."""

import jax
import numpy as np

from cnxs_jax import sharding
from cnxs_jax.errors import DataError


def features(x, y, metric, least=2):
    """`x [n, d]` and `y [m, d]` as float64.

    Raises:
        DataError: fewer than `least` rows on a side, different widths or non-finite features.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise DataError(
            f"expected two [n >= {least}, d] feature arrays of one width, got {x.shape} and "
            f"{y.shape}",
            metric,
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("got non-finite features", metric, "look at the images that made them")
    return x, y


def images(x, metric):
    """`x` as an array, if it is uint8 pictures `[N, H, W, 3]`; DataError otherwise."""
    x = np.asarray(x)
    if x.ndim != 4 or x.shape[-1] != 3 or x.dtype != np.uint8 or not len(x):
        raise DataError(f"expected uint8 images [N, H, W, 3], got {x.dtype} {x.shape}", metric)
    return x


def image_pairs(x, y, metric):
    """Paired uint8 pictures `[N, H, W, 3]` as float64 in 0..255; DataError otherwise."""
    x, y = np.asarray(x), np.asarray(y)
    if x.shape != y.shape:
        raise DataError(f"images must be paired, got {x.shape} and {y.shape}", metric)
    return images(x, metric).astype(np.float64), images(y, metric).astype(np.float64)


def map_pairs(x, y, metric, dtype):
    """Paired maps `[N, H, W]` as `dtype` (bool: anything but zero is true).

    Raises:
        DataError: other shapes, unpaired, empty or with non-finite values.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.shape != y.shape or x.ndim != 3 or not x.size:
        raise DataError(f"expected paired maps [N, H, W], got {x.shape} and {y.shape}", metric)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("got non-finite values in a map", metric)
    return x.astype(dtype), y.astype(dtype)


def in_batches(function, batch_size, *arrays):
    """`function(*arrays)` over batches of rows, as one array; the last one is padded, so that one
    shape compiles. On several devices each takes its part of a batch."""
    outs, place = [], _spread(batch_size)
    for start in range(0, len(arrays[0]), batch_size):
        rows = [a[start : start + batch_size] for a in arrays]
        count = len(rows[0])
        padded = [np.concatenate([r, np.repeat(r[-1:], batch_size - count, 0)]) for r in rows]
        outs.append(np.asarray(function(*map(place, padded)))[:count])
    return np.concatenate(outs)


def _spread(batch_size):
    """What puts a batch on this process's devices; nothing where they do not divide it."""
    devices = jax.local_devices()
    if len(devices) == 1 or batch_size % len(devices):
        return lambda rows: rows
    place = sharding.batch_sharding(sharding.make_mesh(devices=devices))
    return lambda rows: jax.device_put(rows, place)

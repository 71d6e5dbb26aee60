"""A fingerprint of every array of a state, taken where it lies, the same on any mesh.

Orbax does not checksum array data, so `cnxs_jax.checkpoint` compares fingerprints.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import tree as trees
from cnxs_jax.errors import NumericsError


def _words(x):
    """The bits of `x` as uint32, in its own shape."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(index, seed):
    """An odd pseudo-random multiplier for every global index (murmur3's finaliser)."""
    h = index * jnp.uint32(0x9E3779B1) + seed
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return (h ^ (h >> 16)) | jnp.uint32(1)


@jax.jit
def _lane(x, seed):
    """The sum of bits times odd multipliers, modulo 2**32.

    A sum of integers does not depend on its order, so the digest is the same on every mesh; an odd
    multiplier is invertible, so one flipped bit always changes it.
    """
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, stride in enumerate(np.cumprod((1, *x.shape[:0:-1]))[::-1] if x.ndim else ()):
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index += iota * jnp.uint32(int(stride) % 2**32)
    return jnp.sum(_words(x) * _mix(index, seed), dtype=jnp.uint32)


@jax.jit
def _finite(x):
    return jnp.isfinite(x).all()


def _digest(x):
    """`(lane, lane, finite)` of one array.

    One program with one sum after another: several sums over the devices at a time can starve each
    other of threads where simulated devices outnumber the cores, and XLA then ends the process.
    """
    lanes = [int(_lane(x, np.uint32(seed))) for seed in (1, 0x5BD1E995)]
    return *lanes, not jnp.issubdtype(x.dtype, jnp.inexact) or bool(_finite(x))


def fingerprint(tree):
    """{path: [dtype, shape, digest]} of every array, the same on any mesh. Not cryptographic.

    Raises:
        NumericsError: an array holds NaN or infinity; such a state must not replace a good one.
    """
    flat = trees.flatten(tree)
    digests = {path: _digest(x) for path, x in flat.items()}
    bad = [path for path, (_, _, finite) in digests.items() if not finite]
    if bad:
        raise NumericsError(
            f"{len(bad)} of {len(flat)} arrays hold NaN or infinity, first {bad[0]!r}",
            "train state",
            "the last good checkpoint is untouched; lower the learning rate and go on from it",
        )
    return {
        path: [str(x.dtype), list(x.shape), f"{digests[path][0]:08x}{digests[path][1]:08x}"]
        for path, x in flat.items()
    }

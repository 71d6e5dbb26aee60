"""Decoding large latents in overlapping tiles, diffusers' "VAE tiling".

Activations of a decoder grow with the picture; in tiles they grow with the tile. Neighbours overlap
by a quarter and are blended linearly, the upper and left one fading out. The statistics of the
group norms are the tile's own, so the result is near the whole decode and not equal to it.
"""

import jax.numpy as jnp
from jax import lax

TILE = 64  # latents a side: 512 px of the published 8x autoencoders
OVERLAP = 0.25


def decode(decode_fn, latents, factor, tile=TILE, overlap=OVERLAP):
    """Pictures [B,f*h,f*w,C] of latents [B,h,w,c], tile by tile where a side exceeds `tile`.

    Args:
        decode_fn: latents -> pictures, `factor` times as large; compiled once a shape of tile.
        factor: pixels a latent.
        tile: side of a tile, latents; those at the right and lower edge may be smaller.
        overlap: share of a tile that it has in common with its neighbour.
    """
    height, width = latents.shape[1:3]
    if max(height, width) <= tile:
        return decode_fn(latents)
    step, blended = int(tile * (1 - overlap)), int(tile * factor * overlap)
    rows = split(latents, tile, step)
    rows = decode_equal(decode_fn, rows)
    limit = tile * factor - blended
    out = []
    for i, row in enumerate(rows):
        for j, _ in enumerate(row):
            if i > 0:
                row[j] = blend(rows[i - 1][j], row[j], blended, axis=1)
            if j > 0:
                row[j] = blend(row[j - 1], row[j], blended, axis=2)
        out.append(jnp.concatenate([part[:, :limit, :limit] for part in row], axis=2))
    return jnp.concatenate(out, axis=1)


def split(latents, tile, step):
    """Rows of tiles that start every `step` latents."""
    height, width = latents.shape[1:3]
    return [
        [latents[:, i : i + tile, j : j + tile] for j in range(0, width, step)]
        for i in range(0, height, step)
    ]


def decode_equal(decode_fn, rows):
    """Every tile decoded, one at a time: a loop over each set of tiles of one shape."""
    places = {}
    for i, row in enumerate(rows):
        for j, part in enumerate(row):
            places.setdefault(part.shape, []).append((i, j))
    decoded = [[None] * len(row) for row in rows]
    for found in places.values():
        stack = lax.map(decode_fn, jnp.stack([rows[i][j] for i, j in found]))
        for n, (i, j) in enumerate(found):
            decoded[i][j] = stack[n]
    return decoded


def blend(before, after, extent, axis):
    """`after`, whose first `extent` lines fade in over the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    shape = [1] * after.ndim
    shape[axis] = extent
    weight = (jnp.arange(extent) / extent).reshape(shape)
    size = before.shape[axis]
    last = lax.slice_in_dim(before, size - extent, size, axis=axis)
    first = lax.slice_in_dim(after, 0, extent, axis=axis)
    rest = lax.slice_in_dim(after, extent, after.shape[axis], axis=axis)
    return jnp.concatenate([last * (1 - weight) + first * weight, rest], axis=axis)

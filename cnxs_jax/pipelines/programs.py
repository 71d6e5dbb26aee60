"""The programs that pipelines run, and how their rows are laid out.

They are jitted at module level with the network as a static argument, so pipelines that share a
network share its compiled programs; seed, texts, guidance scale and every column of the solver's
table are traced.
"""

import functools

import jax
import jax.numpy as jnp

from cnxs_jax.diffusion import guidance, sampling
from cnxs_jax.models import tiling
from cnxs_jax.pipelines.sizes import resize_and_crop


@functools.partial(jax.jit, static_argnames=("shape",))
def draw(seeds_B, indices_B, shape):
    """Standard normal noise [B, *shape] and one sampling key an image, from seed and index alone.

    Image n's key is fold_in(key(seed), index), so a picture does not depend on its batch.
    """

    def one(seed, index):
        noise_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
        return jax.random.normal(noise_key, shape), step_key

    return jax.vmap(one)(seeds_B, indices_B)


@functools.partial(jax.jit, static_argnames=("module",))
def denoise(module, params, noise, cond, table, keys):
    """Latents [B,h,w,C] from standard normal noise: one program a static signature.

    `module`, `params` and `cond`: one each, or tuples indexed by the table's expert column.
    """
    return sampling.sample(guided(module), params, noise, cond, table, key=keys)


def guided(module):
    """The guided denoiser of a module, or of each in a tuple; a style may have its own weight."""
    if isinstance(module, tuple):
        return tuple(map(guided, module))
    return guidance.styled(sampling.denoiser(module))


@functools.partial(jax.jit, static_argnames=("module", "size", "tile"))
def decode(module, params, latents, size, tile=None):
    """Pictures [B,H,W,3] around [0,1], not clamped, of scaled latents; `size` = (H, W).

    `tile`: latents a side that are decoded at once (`models.tiling`), all of them unless given.
    """

    def whole(z):
        return module.apply({"params": params}, z, method="decode").astype(jnp.float32)

    latents = latents / module.scaling_factor + (module.shift_factor or 0.0)
    tile = max(latents.shape[1:3]) if tile is None else tile
    image = tiling.decode(whole, latents, module.downsample_factor, tile)
    return resize_and_crop(image * 0.5 + 0.5, *size)


@functools.partial(jax.jit, static_argnames=("module",))
def apply(module, params, x):
    """`module` on one array."""
    return module.apply({"params": params}, x)


@functools.partial(jax.jit, static_argnames=("module",))
def encode_text(module, params, ids, mask, *words):
    """What the text encoder makes of ids [B,L] and mask [B,L], and of pseudo-words [B,n,D]."""
    return module.apply({"params": params}, ids, mask, *words)


def over(mesh, tree):
    """Rows repeated up to a multiple of the mesh's batch parts, and split over them.

    Padding is safe because a picture does not depend on its batch; the caller drops it.
    """
    if mesh is None:
        return tree
    from cnxs_jax import sharding

    parts = sharding.batch_parts(mesh)

    def place(x):
        missing = -x.shape[0] % parts
        x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
        return jax.device_put(x, sharding.batch_sharding(mesh))

    return jax.tree.map(place, tree)


def repeated(cond, count):
    """Every row of a condition `count` times: images of one prompt are neighbours."""
    return {name: jnp.repeat(value, count, axis=0) for name, value in cond.items()}

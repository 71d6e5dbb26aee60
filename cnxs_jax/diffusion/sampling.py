"""The one sampling loop: a denoiser, a solver table, one `lax.scan` a segment.

Call `sample` inside `jax.jit` with the table as an argument: the table's numbers are then traced
and changing them does not compile again.
"""

import functools
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.diffusion.prediction import mean_channels
from cnxs_jax.diffusion.table import COLUMNS
from cnxs_jax.errors import ConfigError


@dataclass(frozen=True)
class Denoiser:
    """A Linen module as `denoise(params, x, t, cond) -> out`, with `prepare(params, cond)`.

    Equal for equal modules, so that as a static argument of `jax.jit` it does not recompile.
    """

    module: Any

    def __call__(self, params, x, t, cond):
        """Raw network output `[B, H, W, >= C]`."""
        return self.module.apply({"params": params}, x, t, cond)

    def prepare(self, params, cond):
        """`cond` with what does not depend on `x` and `t` computed; as it is if nothing is."""
        if not hasattr(self.module, "prepare"):
            return cond
        return self.module.apply({"params": params}, cond, method="prepare")


def denoiser(module):
    """The denoiser of a Linen module; see `Denoiser`."""
    return Denoiser(module)


def prepare(denoise, params, cond):
    """`denoise.prepare(params, cond)`, or `cond` where the denoiser has no such attribute."""
    return denoise.prepare(params, cond) if hasattr(denoise, "prepare") else cond


def sample(denoise, params, x, cond, table, key=None, noise=None, post=None):
    """Runs the rows of `table` and returns the last `x`.

    Args:
        denoise, params, cond: one each, or a tuple indexed by the table's expert column.
        x: `[B, H, W, C]` standard normal noise; the loop multiplies it by `table.init_scale`.
        cond: dict of arrays with a leading batch axis. The loop writes `sigma`, multiplies
            `control_scale` by the row's control, writes into `control_active` whether that is
            nonzero (a scale of 0 may not be the same as no control: see `controlled_unet`) and
            removes `null` on rows that are not guided.
        table: a `solvers` table.
        key: one random key, or one per image `[B]`. Image i draws from `fold_in(key, i)` (or its
            own key) and the row's number, so a picture does not depend on its batch.
        noise: `[rows, B, H, W, C]`, used instead of random numbers (exact replays).
        post: function of the predicted x0, such as `guidance.dynamic_threshold()`.

    Returns:
        float32 `[B, H, W, C]`: the clean sample (with edm: x0 itself).

    Raises:
        ConfigError: noise is needed and neither key nor noise is given, `noise` has the wrong
            shape, or a tuple has fewer entries than the table has experts.
    """
    _check_experts(table, denoise=denoise, params=params, cond=cond)
    carry, columns, keys = _start(x, table, key, noise)
    prepared = {}
    for (expert, guided), low, high in _segments(table, cond):
        network, tree, own_cond = (_of(expert, v) for v in (denoise, params, cond))
        if (expert, guided) not in prepared:
            wanted = own_cond if guided else _without_null(own_cond)
            wanted = _with_scale(wanted, x.shape[0])
            prepared[expert, guided] = prepare(network, tree, wanted)
        row = _row(network, tree, prepared[expert, guided], keys, post)
        rows = {name: column[low:high] for name, column in columns.items()}
        carry, _ = jax.lax.scan(row, carry, rows)
    return carry[0]


def sample_from_host(
    denoise, params, x, cond, table, key=None, noise=None, post=None, load=jax.device_put
):
    """`sample` with experts that lie in host memory: one of them on the device at a time.

    A Python loop over one compiled row, which equal modules share; not to be called inside a jit.
    Arguments, result and errors are those of `sample`, and besides:

    Args:
        params: a tree of host arrays, or a tuple of them, one an expert.
        post: compiled again for every new function: make it once.
        load: `tree -> tree on the device`, called once a segment.
    """
    _check_experts(table, denoise=denoise, params=params, cond=cond)
    carry, columns, keys = _start(x, table, key, noise)
    for (expert, guided), low, high in _segments(table, cond):
        network, own_cond = _of(expert, denoise), _of(expert, cond)
        tree = load(_of(expert, params))
        wanted = own_cond if guided else _without_null(own_cond)
        prepared = _prepare_once(network, tree, _with_scale(wanted, x.shape[0]))
        for i in range(low, high):
            row = {name: column[i] for name, column in columns.items()}
            carry = _one_row(network, post, tree, carry, prepared, row, keys)
        del tree  # before the next expert comes, or there would be two
        carry = jax.block_until_ready(carry)
    return carry[0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _one_row(denoise, post, params, carry, cond, row, keys):
    return _row(denoise, params, cond, keys, post)(carry, row)[0]


@functools.partial(jax.jit, static_argnums=0)
def _prepare_once(denoise, params, cond):
    return prepare(denoise, params, cond)


def _start(x, table, key, noise):
    """`((x, history), columns, keys)` before the first row."""
    x = x.astype(jnp.float32) * jnp.asarray(table.init_scale, jnp.float32)
    columns = {name: jnp.asarray(getattr(table, name), jnp.float32) for name in COLUMNS}
    columns |= _noise_source(table, x, key, noise)
    keys = _image_keys(key, x.shape[0]) if noise is None and table.stochastic else None
    history = tuple(jnp.zeros_like(x) for _ in range(columns["b"].shape[1] - 1))
    return (x, history), columns, keys


def _row(denoise, params, cond, keys, post):
    """The loop body: `(x, history), columns of one row -> (x, history)`."""

    def row(carry, r):
        x, history = carry
        t = jnp.full((x.shape[0],), r["t"], jnp.float32)
        out = denoise(params, x, t, _row_cond(cond, r["sigma"], r["control"], x.shape[0]))
        x0 = r["p"] * x + r["q"] * mean_channels(out, x)
        if post is not None:
            x0 = post(x0)
        past = (r["u"] * x + r["v"] * x0, *history)
        x = r["a"] * x + sum(r["b"][k] * h for k, h in enumerate(past))
        if keys is not None:
            x = x + r["d"] * _draw(keys, r["step"], x.shape[1:])
        elif "noise" in r:
            x = x + r["d"] * r["noise"]
        return (x, past[:-1]), None

    return row


def _row_cond(cond, sigma, control, batch):
    """`cond` with the row's noise level written and its control factor applied."""
    cond = {**cond, "sigma": jnp.full((batch,), sigma, jnp.float32)}
    cond = _controlled(cond, control)
    return {**cond, "null": _controlled(cond["null"], control)} if "null" in cond else cond


def _with_scale(cond, batch):
    """`cond` with a control scale of 1 where there is a hint and none: rows multiply it."""
    if "hint" not in cond or "control_scale" in cond:
        return cond
    one, hint = jnp.ones((batch,), jnp.float32), cond["hint"]
    several = isinstance(hint, tuple | list)
    return {**cond, "control_scale": (one,) * len(hint) if several else one}


def _controlled(cond, control):
    if "control_scale" not in cond:
        return cond
    scale = cond["control_scale"]
    ones, active = jax.tree.map(jnp.ones_like, scale), jnp.asarray(control != 0, jnp.float32)
    return {
        **cond,
        "control_scale": _scaled(scale, control),
        "control_active": _scaled(ones, active),
    }


def _scaled(scale, control):
    if isinstance(scale, tuple | list):
        factors = jnp.broadcast_to(control, (len(scale),))
        return tuple(s * factors[i] for i, s in enumerate(scale))
    return scale * jnp.reshape(control, ())


def _draw(keys, step, shape):
    step = step.astype(jnp.uint32)
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, step), shape))(keys)


def _image_keys(key, batch):
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch, dtype=jnp.uint32))
    if key.shape != (batch,):
        raise ConfigError(f"expected one key or {batch} keys, got {key.shape}", "key")
    return key


def _noise_source(table, x, key, noise):
    """The scanned columns that the row's noise needs, after checking that there is a source."""
    if noise is not None:
        if noise.shape != (len(table), *x.shape):
            raise ConfigError(f"expected {(len(table), *x.shape)}, got {noise.shape}", "noise")
        return {"noise": jnp.asarray(noise, jnp.float32)}
    if table.stochastic and key is None:
        raise ConfigError(
            "this solver adds noise at each step, but there is neither key nor noise",
            "sampling.sample",
            "pass key=jax.random.key(seed)",
        )
    return {"step": jnp.arange(len(table))}


def _segments(table, cond):
    """`((expert, guided), first row, end row)` for each run of equal static columns."""
    # Without a null branch both values of `guided` are the same program: do not split for it.
    has_null = [("null" in _of(expert, cond)) for expert in range(table.num_experts)]
    rows = [(e, bool(g) and has_null[e]) for e, g in zip(table.expert, table.guided, strict=True)]
    start = 0
    for value, group in groupby(rows):
        end = start + len(list(group))
        yield value, start, end
        start = end


def _of(expert, value):
    return value[expert] if isinstance(value, tuple) else value


def _without_null(cond):
    return {k: v for k, v in cond.items() if k != "null"}


def _check_experts(table, **values):
    for name, value in values.items():
        if isinstance(value, tuple) and len(value) < table.num_experts:
            raise ConfigError(
                f"the table routes to {table.num_experts} experts, {name} has {len(value)}",
                f"sampling.sample({name}=...)",
                "give one entry an expert, or route with other edges",
            )
    single = not any(isinstance(v, tuple) for v in values.values())
    if single and np.max(table.expert) > 0:
        raise ConfigError("the table routes to several experts, but one was given", "table")

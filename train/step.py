"""The one train step. It names no model and no task: those are the objective's business."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """What training changes. `params` holds trainable leaves only; `ema` mirrors it in float32."""

    step: Any
    params: Any
    ema: Any
    opt_state: Any


def init_state(params, tx):
    """The state before the first step; the EMA starts as a copy of the parameters.

    `params` is copied too: the step donates its state, and the teacher may be the same arrays.
    """
    params = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params))


def example_keys(key, batch_size):
    """One key an example, so that a draw does not depend on how a batch is cut into parts.

    Takes one key, or passes on keys [batch_size] that the caller has split already.
    """
    return key if key.ndim else jax.random.split(key, batch_size)


def ema_decay_at(step, decay, warmup):
    """The decay at `step`; the warm-up forgets the initial weights: min(decay, (1+s)/(10+s))."""
    if not warmup:
        return jnp.float32(decay)
    step = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def make_step(objective, tx, ema_decay, grad_accum=1, ema_warmup=False):
    """`step(state, frozen, batch, key) -> (state, metrics)`, to be jitted with `state` donated.

    Args:
        objective: `objective(params, ema, frozen, batch, keys) -> (loss, metrics)`, a mean over
            the batch; `keys` is [B], one an example.
        tx: optax transformation.
        ema_decay: of the average of `params`, updated after them.
        grad_accum: micro-batches a step. Their gradients are averaged in float32, so the result
            is that of the whole batch.
        ema_warmup: see `ema_decay_at`.

    A step with a non-finite loss or gradient leaves the state as it was and says so in
    `metrics["finite"]`; the loop stops there.
    """

    def step(state, frozen, batch, key):
        batch_size = jax.tree.leaves(batch)[0].shape[0]
        keys = example_keys(jax.random.fold_in(key, state.step), batch_size)
        grad_fn = jax.value_and_grad(objective, has_aux=True)
        (loss, aux), grads = accumulate(
            lambda b, k: grad_fn(state.params, state.ema, frozen, b, k), batch, keys, grad_accum
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay_at(state.step, ema_decay, ema_warmup)
        ema = jax.tree.map(
            lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32), state.ema, params
        )
        new = TrainState(state.step + 1, params, ema, opt_state)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
        metrics = {
            **aux,
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(new.params),
            "update_norm": optax.tree.norm(updates),
            "finite": finite,
        }
        return new, metrics

    return step


def accumulate(value_and_grad, batch, keys, parts):
    """Mean of `value_and_grad(batch, keys)` over `parts` equal micro-batches, one at a time.

    Micro-batch i takes rows i, i + parts, ...: on a mesh every device keeps its own rows.
    """
    if parts == 1:
        return value_and_grad(batch, keys)

    def cut(x):
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    micro = jax.tree.map(cut, (batch, keys))
    shapes = jax.eval_shape(value_and_grad, *jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(*part)), None

    total, _ = jax.lax.scan(body, zeros, micro)
    return jax.tree.map(lambda x: x / parts, total)

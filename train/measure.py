"""One real train step of a recipe on random weights, its memory beside the prediction.

For `python -m train.plan --measure`: state, frozen networks and a batch of features have their true
sizes, the encoders are not there. On a CPU, where the peak of the process can be asked for.
"""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import tree as trees
from cnxs_jax.errors import ConfigError
from train import abstract, networks, optimizer
from train.step import init_state, make_step

GB = 1e9


def random(shapes, rng, scale=0.02):
    """Arrays of these shapes: normal numbers, ones where they are whole."""

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.ones(leaf.shape, leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(scale * values, leaf.dtype)

    return jax.tree.map(draw, shapes)


def peak():
    """The most memory that this process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(config):
    """Runs the step; prints and returns predicted and measured bytes, seconds and the loss."""
    if networks.recipe_of(config).zeros is not None:
        what = "only the steps of PixArt's tasks can be measured"
        raise ConfigError(what, config.task, "leave out --measure")
    before, rng = peak(), np.random.default_rng(0)
    _, _, shapes = abstract.built(config)
    found = networks.modules(config, config[networks.recipe_of(config).path])
    weights = random(found["transformer"][1], rng)
    task, state, frozen = start(config, found, weights)
    batch = random(shapes["batch"], rng, scale=1.0)
    tx = optimizer.make_optimizer(config.optimizer, config.steps)
    step = jax.jit(make_step(task.objective, tx, config.ema_decay, config.grad_accum),
                   donate_argnums=0)  # fmt: skip
    started = time.perf_counter()
    run = step.lower(state, frozen, batch, jax.random.key(0)).compile()
    compiling = time.perf_counter() - started
    memory = run.memory_analysis()
    predicted = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    started = time.perf_counter()
    state, metrics = jax.block_until_ready(run(state, frozen, batch, jax.random.key(0)))
    result = {
        "parameters": trees.size(state.params),
        "predicted bytes": predicted,
        "measured bytes": peak() - before,
        "compile s": compiling,
        "step s": time.perf_counter() - started,
        "loss": float(metrics["loss"]),
        "finite": bool(metrics["finite"]),
    }
    ratio = result["measured bytes"] / predicted
    print(
        f"one step of {result['parameters']:,} parameters, batch {config.batch_size}: "
        f"{result['step s']:.1f} s after {compiling:.1f} s of compilation, "
        f"loss {result['loss']:.4g}\n"
        f"memory: predicted {predicted / GB:.2f} GB, measured {result['measured bytes'] / GB:.2f} "
        f"GB ({ratio:.2f} of it)"
    )
    return result


def start(config, found, weights):
    """`(Task, state, frozen)` of a recipe on these weights of the denoiser, as a run has them."""
    dit, vae, text = (found[name][0] for name in ("transformer", "vae", "text_encoder"))
    nets = networks.Networks(dit, weights, vae, None, text, None)
    recipe = networks.recipe_of(config)
    task, _ = recipe.build(config, nets, {})
    tx = optimizer.make_optimizer(config.optimizer, config.steps)
    if callable(task.params):
        state = jax.jit(lambda key: init_state(task.params(key), tx))(jax.random.key(0))
    else:
        state = jax.jit(lambda params: init_state(params, tx))(task.params)
    return task._replace(params=None), state, task.frozen

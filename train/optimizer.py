"""Optimizers from a config: name, learning-rate schedule, weight decay and freezing by pattern."""

import jax
import optax

from cnxs_jax import tree as trees
from cnxs_jax.errors import ConfigError, did_you_mean

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "cosine")
ONLY_OF = {"weight_decay": ("adamw",), "momentum": ("sgd",)}  # the optimizers that read a key
NO_DECAY = (r".*(bias|scale|embedding|scale_shift_table)",)

DEFAULTS = {
    "name": "adamw",
    "learning_rate": 1e-4,
    "schedule": "constant",
    "warmup_steps": 0,
    "final_scale": 0.0,  # cosine: the last learning rate over the highest
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "no_decay": NO_DECAY,
    "clip_norm": 1.0,  # None: no clipping
}


def learning_rate(config, steps):
    """`step -> learning rate`: linear warm-up from 0, then constant or cosine."""
    peak, warmup = config["learning_rate"], config["warmup_steps"]
    if config["schedule"] == "cosine":
        main = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config["final_scale"])
    elif config["schedule"] == "constant":
        main = optax.constant_schedule(peak)
    else:
        raise ConfigError(
            f"unknown schedule {config['schedule']!r}."
            f"{did_you_mean(config['schedule'], SCHEDULES)}",
            "optimizer.schedule",
        )
    if not warmup:
        return main
    # optax counts from 0; a first step at learning rate 0 would be lost
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, main], [warmup])


def make_optimizer(config, steps):
    """The optax transformation of `config` (keys of `DEFAULTS`) for a run of `steps`."""
    config = {**DEFAULTS, **dict(config)}
    rate = learning_rate(config, steps)
    adam = {"b1": config["b1"], "b2": config["b2"], "eps": config["eps"]}

    def decayed(params):
        return trees.map_with_path(
            lambda path, _: not trees.matches(tuple(config["no_decay"]), path), params
        )

    if config["name"] == "adamw":
        tx = optax.adamw(rate, weight_decay=config["weight_decay"], mask=decayed, **adam)
    elif config["name"] == "adam":
        tx = optax.adam(rate, **adam)
    elif config["name"] == "sgd":
        tx = optax.sgd(rate, momentum=config["momentum"] or None)
    else:
        raise ConfigError(
            f"unknown optimizer {config['name']!r}.{did_you_mean(config['name'], OPTIMIZERS)}",
            "optimizer.name",
        )
    if config["clip_norm"] is None:
        return tx
    return optax.chain(optax.clip_by_global_norm(config["clip_norm"]), tx)


def freeze(params, patterns):
    """`(trainable, frozen)` trees: frozen leaves get neither gradients nor optimizer state.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left to train.
    """
    if not patterns:
        return params, {}
    trees.check_rules(patterns, trees.flatten(params), "freeze")
    frozen, trainable = trees.split(params, patterns)
    if not jax.tree.leaves(trainable):
        raise ConfigError(f"the patterns {tuple(patterns)} freeze every parameter", "freeze")
    return trainable, frozen

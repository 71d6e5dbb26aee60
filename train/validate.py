"""Checks a config on the host, before any device work: a table of keys, then their conflicts.

A table maps a key to a check or to another table. A check is `check(value, where)` and raises
ConfigError. A task's module lists its own keys in `KEYS = {function name: table}`, and in
`CONFLICTS`, if it has any, what cannot go together: `{function name: check(values, where)}`.
"""

import importlib
import math
import re

from cnxs_jax import precision, sharding
from cnxs_jax.errors import ConfigError, did_you_mean
from train import optimizer

MIN_KEPT = 2  # one checkpoint to fall back on


class Optional:
    """A check for a key that may be missing or None."""

    def __init__(self, check):
        self.check = check


def number(low=-math.inf, high=math.inf, open_low=False, open_high=False):
    """A finite number in the given range."""

    def check(value, where):
        brackets = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            hint = "write 0.0001, not '1e-4'" if isinstance(value, str) else None
            raise ConfigError(f"{value!r} is not a number, expected {brackets}", where, hint)
        if not math.isfinite(value) or not low <= value <= high:
            raise ConfigError(f"{value!r} is out of range, expected {brackets}", where)
        if (open_low and value == low) or (open_high and value == high):
            raise ConfigError(f"{value!r} is out of range, expected {brackets}", where)

    return check


def integer(low=0, high=2**53):
    """An integer in [low, high]."""

    def check(value, where):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{value!r} is not an integer", where)
        if not low <= value <= high:
            expected = f"{low} or more" if high == 2**53 else f"[{low}, {high}]"
            raise ConfigError(f"{value!r} is out of range, expected {expected}", where)

    return check


def choice(*values):
    """One of `values`."""

    def check(value, where):
        if value not in values:
            raise ConfigError(
                f"unknown value {value!r}.{did_you_mean(value, values)}",
                where,
                f"use one of {', '.join(map(str, values))}",
            )

    return check


def text(value, where):
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{value!r} is not a string", where)


def boolean(value, where):
    if not isinstance(value, bool):
        raise ConfigError(f"{value!r} is not True or False", where)


def patterns(value, where):
    """A sequence of regular expressions."""
    if not sequence(value):
        raise ConfigError(f"{value!r} is not a tuple of patterns", where, "write (pattern,)")
    for pattern in value:
        text(pattern, where)
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{pattern!r} is not a regular expression: {error}", where) from None


def mesh(value, where):
    if not isinstance(value, dict):
        raise ConfigError(f"{value!r} is not {{axis: size}}", where, 'write {"data": -1}')
    sharding.check_mesh(value, where=where)


def sequence(value):
    return isinstance(value, list | tuple)


def rules(value, where):
    """`((pattern, spec), ...)`; a spec holds axes, tuples of axes and None."""
    if not sequence(value):
        raise ConfigError(f"{value!r} is not a tuple of rules", where, "write ((pattern, spec),)")
    for rule in value:
        if not sequence(rule) or len(rule) != 2 or not sequence(rule[1]):
            raise ConfigError(f"{rule!r} is not (pattern, spec)", where, "spec: ('fsdp', 'tensor')")
        patterns((rule[0],), where)
        for axes in rule[1]:
            for axis in axes if sequence(axes) else () if axes is None else (axes,):
                choice(*sharding.AXES)(axis, where)


def solvers(value, where):
    """Names of the report's solvers: a wrong one would show only after the training."""
    from eval.plan import SCHEDULERS  # here: evaluation imports much, and few configs ask

    if not sequence(value) or not value:
        raise ConfigError(f"{value!r} is not a tuple of solvers", where, "write (name,)")
    for name in value:
        choice(*SCHEDULERS)(name, where)


def metrics(value, where):
    """Names of what the report measures, likewise."""
    from eval.measures import METRICS

    if not sequence(value) or not value:
        raise ConfigError(f"{value!r} is not a tuple of metrics", where, "write (name,)")
    for name in value:
        choice(*METRICS)(name, where)


def integers(length=None, low=1):
    """A tuple of integers."""

    def check(value, where):
        if not sequence(value) or not value or (length is not None and len(value) != length):
            raise ConfigError(f"{value!r} is not a tuple of {length or ''} integers", where)
        for item in value:
            integer(low)(item, where)

    return check


def counts(value, where):
    """A positive integer, or a tuple of them."""
    for item in value if sequence(value) else (value,):
        integer(1)(item, where)


def texts(value, where):
    """A tuple of strings."""
    if not sequence(value) or not value:
        raise ConfigError(f"{value!r} is not a tuple of strings", where)
    for item in value:
        text(item, where)


def booleans(value, where):
    """A tuple of True and False."""
    if not sequence(value):
        raise ConfigError(f"{value!r} is not a tuple of True and False", where)
    for item in value:
        boolean(item, where)


def numbers(length):
    """A tuple of numbers."""

    def check(value, where):
        if not sequence(value) or len(value) != length:
            raise ConfigError(f"{value!r} is not a tuple of {length} numbers", where)
        for item in value:
            number()(item, where)

    return check


def anything(value, where):
    """No check here; whoever reads the value checks it."""


COMMON = {
    "name": Optional(text),
    "task": text,
    "seed": integer(0, 2**31 - 1),
    "steps": integer(1),
    "batch_size": integer(1),
    "grad_accum": integer(1),
    "ema_decay": number(0, 1, open_high=True),
    "ema_warmup": Optional(boolean),
    "log_every": integer(1),
    "save_every": integer(1),
    "sample_every": integer(1),
    "max_to_keep": Optional(integer(MIN_KEPT)),
    "mesh": mesh,
    "rules": Optional(rules),
    "freeze": Optional(patterns),
    "matmul_precision": Optional(choice(*precision.PRECISIONS)),
    "resume": Optional(boolean),
    "optimizer": {
        "name": choice(*optimizer.OPTIMIZERS),
        "learning_rate": number(0, 10, open_low=True),
        "schedule": Optional(choice(*optimizer.SCHEDULES)),
        "warmup_steps": Optional(integer(0)),
        "final_scale": Optional(number(0, 1)),
        "b1": Optional(number(0, 1, open_high=True)),
        "b2": Optional(number(0, 1, open_high=True)),
        "eps": Optional(number(0, 1, open_low=True)),
        "momentum": Optional(number(0, 1, open_high=True)),
        "weight_decay": Optional(number(0, 1)),
        "no_decay": Optional(patterns),
        "clip_norm": Optional(number(0, open_low=True)),
    },
    "report": Optional(
        {
            "num_prompts": integer(0),
            "num_real": integer(2),
            "steps": integers(low=1),
            "reference_steps": Optional(integer(1)),
            "solvers": Optional(solvers),
            "metrics": Optional(metrics),
            "guidance_scale": Optional(number(0)),
        }
    ),
}


def check(config):
    """Checks a config, or each stage of one.

    Raises:
        ConfigError: what is wrong, which key, and how to mend it.
    """
    values = config.to_dict()
    stages = values.get("stages")
    if stages is None:
        check_stage(values, "config")
        return
    if not sequence(stages):
        raise ConfigError(f"{stages!r} is not a tuple of stages", "config.stages")
    missing = [name for name in stages if not isinstance(values.get(name), dict)]
    if missing or not stages:
        raise ConfigError(f"config.stages names {missing or 'nothing'}", "config.stages")
    known = {name: anything for name in stages}
    table = {"stages": anything, "report": Optional(anything), "resume": Optional(boolean)}
    table |= {"finish": Optional(finish), "cpu_devices": Optional(integer(1))}
    check_table(values, {**table, **known}, "config")
    for name in stages:
        check_stage(values[name], f"config.{name}")
    if values.get("finish"):
        _, plan_conflicts = task_tables(values["finish"]["task"], "config.finish.task")
        if plan_conflicts is not None:
            plan_conflicts(values, "config")


def finish(value, where):
    """A table with "task" ("module:function") and the keys that this function reads."""
    if not isinstance(value, dict) or not isinstance(value.get("task"), str):
        raise ConfigError(f"{value!r} is not {{'task': 'module:function', ...}}", where)
    extra, _ = task_tables(value["task"], f"{where}.task")
    check_table(value, {"task": text, **extra}, where)


def function_of(task):
    """The function that "module:function" names."""
    module, _, function = task.partition(":")
    return getattr(importlib.import_module(module), function)


def check_stage(values, where):
    """One stage: its keys, the task's keys, then their conflicts."""
    text(values.get("task"), f"{where}.task")
    extra, task_conflicts = task_tables(values["task"], f"{where}.task")
    check_table(values, {**COMMON, **extra}, where)
    conflicts(values, where)
    if task_conflicts is not None:
        task_conflicts(values, where)


def task_tables(task, where):
    """The table of the keys that `task` ("module:function") reads, and its check of conflicts."""
    module, _, function = task.partition(":")
    found = module_of(module)
    if found is None:
        what = f"no task {task!r}: there is no module {module!r}"
        raise ConfigError(what, where, "write module:function")
    tables = getattr(found, "KEYS", {})
    if function not in tables:
        raise ConfigError(
            f"{module} has no task {function!r}.{did_you_mean(function, tables)}",
            where,
            f"its tasks are {', '.join(tables)}",
        )
    return tables[function], getattr(found, "CONFLICTS", {}).get(function)


def module_of(name):
    """The module of this name, None where there is none; what it raises itself is its own fault."""
    if not all(part.isidentifier() for part in name.split(".")):  # "", ".relative"
        return None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, another that it imports is not
        return None


def check_table(values, table, where):
    """Every key of `values` is in `table` and passes; every required key is there."""
    for key in values:
        if key not in table:
            raise ConfigError(f"unknown key {key!r}.{did_you_mean(key, table)}", where)
    for key, rule in table.items():
        name, value = f"{where}.{key}", values.get(key)
        if isinstance(rule, Optional):
            if value is None:
                continue
            rule = rule.check
        if key not in values:
            raise ConfigError(f"the key {key!r} is missing", where)
        if isinstance(rule, dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{value!r} is not a table of keys", name)
            check_table(value, rule, name)
        else:
            rule(value, name)


def conflicts(values, where):
    """What single keys cannot show."""
    steps, batch, parts = values["steps"], values["batch_size"], values["grad_accum"]
    optim = values["optimizer"]
    if (optim.get("warmup_steps") or 0) > steps:
        raise ConfigError(
            f"warmup_steps {optim['warmup_steps']} is more than steps {steps}",
            f"{where}.optimizer.warmup_steps",
            f"set it to a tenth of the steps, {steps // 10}, or train longer",
        )
    for key, users in optimizer.ONLY_OF.items():
        if optim.get(key) and optim["name"] not in users:
            raise ConfigError(
                f"{key} has no effect with {optim['name']}",
                f"{where}.optimizer.{key}",
                f"leave it out, or use {' or '.join(users)}",
            )
    if batch % parts:
        raise ConfigError(
            f"batch_size {batch} is not divisible by grad_accum {parts}; "
            f"the nearest are {nearest(batch, parts)}",
            f"{where}.batch_size",
        )
    sizes = sharding.check_mesh(values["mesh"])
    known = [sizes[axis] for axis in sharding.BATCH if sizes[axis] != -1]
    check_division(batch, parts, math.prod(known), where)


def check_batch(config, batch_parts):
    """The batch against the mesh, once the number of devices is known."""
    check_division(config.batch_size, config.grad_accum, batch_parts, "config")


def check_division(batch, grad_accum, batch_parts, where):
    if batch % (batch_parts * grad_accum):
        raise ConfigError(
            f"batch_size {batch} is not divisible by mesh data x fsdp = {batch_parts} times "
            f"grad_accum {grad_accum}; the nearest are {nearest(batch, batch_parts * grad_accum)}",
            f"{where}.batch_size",
        )


def nearest(value, multiple):
    """The nearest multiples below and above, as text."""
    low = value // multiple * multiple
    return f"{low} and {low + multiple}" if low else f"{multiple}"

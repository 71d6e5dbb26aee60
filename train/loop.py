"""The training loop: `main(config, workdir)`. Everything about a model is in its `Task`.

A run's directory: `config.json`, `metrics.jsonl`, TensorBoard events, `checkpoints/`,
`samples/*.png`, `export/`. A config with `stages` runs them in order, each in its own directory.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cnxs_jax import checkpoint, precision, sharding
from cnxs_jax import tree as trees
from cnxs_jax.errors import ConfigError, Stopped
from cnxs_jax.storage import write_json
from train import branch, optimizer, report, validate
from train.log import Progress, StopSignal, Writer
from train.step import init_state, make_step
from train.workdir import (
    OLD_EXPORT,
    PARAMETERS,
    check_branches,
    check_same,
    check_workdir,
    expand,
    plain,
    set_aside,
)


class Task(NamedTuple):
    """What a config's `task` ("module:function") makes of the config.

    Attributes:
        objective: see `train.objectives`.
        params: the trainable parameters, or `init(key) -> params` (jitted, made where they live).
        loader: an iterator of dicts of numpy arrays [B, ...] with `get_state` and `set_state`;
            keys whose values are not numeric are left out.
        encode: `(encoders, raw, key) -> {"x", "cond"}`, jitted.
        encoders, frozen: parameters that do not change, for `encode` and for the objective.
        sample: `(ema, frozen, encoders) -> uint8 image`, or None.
        export: `(ema, frozen, encoders, path)` writes the result there, or None.
        parent: a run's directory whose newest state (parameters, EMA, moments) this one starts
            from, or None; see `train.branch`.
        experts: None, or the number of experts that are trained side by side, as `train.branch`
            says: state, `frozen` and what `export` gets have that leading axis.
    """

    objective: Callable
    params: Any
    loader: Any
    encode: Callable
    encoders: Any = {}
    frozen: Any = {}
    sample: Callable | None = None
    export: Callable | None = None
    parent: str | None = None
    experts: int | None = None


def main(config, workdir, resume=False):
    """Trains `config` in `workdir`.

    Args:
        config: an ml_collections ConfigDict; `train.validate` lists its keys.
        workdir: new, or the directory of a run to go on with.
        resume: go on from the newest good checkpoint, if there is one; a finished run goes on if
            the config has more steps than it had, and its export is replaced.

    Raises:
        ConfigError, DataError, CheckpointError, NumericsError: see `cnxs_jax.errors`.
        Stopped: SIGTERM or SIGINT came; the state was saved.
    """
    root = pathlib.Path(workdir).expanduser().absolute()
    resume = resume or config.get("resume", False)
    validate.check(config)
    stages = config.get("stages", ())
    runs = [(root / name, config[name]) for name in stages] or [(root, config)]
    for _, run_config in runs:
        report.check(run_config)
    finished = [check_workdir(path, run_config, root, resume) for path, run_config in runs]
    check_branches(runs, finished, root)
    lead = jax.process_index() == 0
    with checkpoint.lock(root) if lead else contextlib.nullcontext():
        if stages and lead:
            write_json(root / "config.json", plain(config))
        for (path, run_config), done in zip(runs, finished, strict=True):
            if done:
                print(f"{path.name}: finished before, see {path / 'export'}", flush=True)
            else:
                run(run_config, path, root, resume)
            if lead:
                report.write(expand(run_config, root), path)
            barrier(f"report of {path.name}")
        if config.get("finish"):
            if lead:
                report.finish(expand(config, root), root, again=not all(finished))
            barrier("finished")


def build_task(config):
    """The Task of `config.task`, "module:function"."""
    return validate.function_of(config.task)(config)


def run(config, workdir, root, resume=False):
    """One stage: build, restore, train, export.

    `config` still has its `{workdir}`, which is `root`, and is stored so: the directory may move.
    """
    mesh = sharding.make_mesh(config.mesh)
    validate.check_batch(config, sharding.batch_parts(mesh))
    lead = jax.process_index() == 0
    with (
        jax.set_mesh(mesh),
        StopSignal() as stop,
        checkpoint.Checkpoints(
            workdir / "checkpoints", config.get("max_to_keep") or 2, resume
        ) as checkpoints,
    ):
        fit = Fit(config, build_task(expand(config, root)), mesh, root)
        start = fit.restore(checkpoints)
        if lead:
            set_aside(workdir)
            write_json(workdir / "config.json", plain(config))
            write_json(workdir / PARAMETERS, fit.parameters())
        with precision.matmul(fit.precision):
            with Writer(workdir, start, lead) as writer:
                fit.train(start, checkpoints, writer, stop)
            fit.finish(workdir, lead)
        if stop.name:  # the signal came after the last step
            raise Stopped(
                f"stopped by {stop.name}; {workdir.name} is finished",
                workdir,
                "start again with --resume to go on with what follows it",
            )
    barrier(f"finished {workdir.name}")


def barrier(name):
    """Waits for all processes: they read what the lead has exported, and one that leaves the
    cluster minutes before the others ends them."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


class Fit:
    """A task on a mesh: the state, the jitted functions and the loop over them."""

    def __init__(self, config, task, mesh, root):
        self.config, self.mesh, self.root = config, mesh, root
        self.rules = tuple((p, tuple(s)) for p, s in config.get("rules") or ())
        self.frozen = self.place(task.frozen)
        self.encoders = self.place(task.encoders)
        key_init, self.key_encode, self.key_step = jax.random.split(jax.random.key(config.seed), 3)
        tx = optimizer.make_optimizer(config.optimizer, config.steps)
        self.make, self.arguments = self.initial(task.params, tx, key_init)
        shapes = jax.eval_shape(self.make, *self.arguments)
        self.one = sharding.abstract(shapes, sharding.shardings(shapes, mesh, self.rules))
        # What is placed is not kept a second time where the task made it.
        self.task = task._replace(params=None, frozen=None, encoders=None)
        self.abstract = branch.stacked(self.one, task.experts) if task.experts else self.one
        self.placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        step = make_step(
            task.objective, tx, config.ema_decay, config.grad_accum, config.get("ema_warmup", False)
        )
        whole, self.summary = sharding.replicated(mesh), lambda metrics: metrics
        if task.experts:
            parts = task.experts * sharding.batch_parts(mesh)
            validate.check_division(config.batch_size, config.grad_accum, parts, "config")
            step = branch.side_by_side(step, task.experts, mesh)
            self.summary = jax.jit(branch.summary, out_shardings=whole)
            whole = branch.apart(mesh)
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(self.placed, whole))
        self.encode = jax.jit(task.encode)
        self.state, self.precision = None, None

    def place(self, tree):
        """Host or device arrays on the mesh; the rules apply where they match."""
        where = sharding.shardings(tree, self.mesh, self.rules, strict=False)
        return jax.tree.map(sharding.put, tree, where)

    def initial(self, params, tx, key):
        """`(make, arguments)`: `make(*arguments)` is the first TrainState.

        Given parameters are an argument, never a constant of the compiled program.
        """
        if callable(params):
            return lambda: init_state(params(key), tx), ()
        return lambda given: init_state(given, tx), (self.place(params),)

    def restore(self, checkpoints):
        """Fills `state` from the newest good checkpoint or anew; returns the step to go on from.

        Also `precision`: "auto" is resolved when a run starts and stays that, to the bit.
        """
        stored = checkpoints.restore(
            self.abstract,
            lambda meta: check_same(meta["config"], self.config, "checkpoint", self.root),
        )
        if stored is None:
            self.precision = precision.resolve(self.config.get("matmul_precision"))
            with precision.matmul(self.precision):
                self.state = self.fresh()
            self.arguments = None
            return 0
        self.state, data, meta = stored
        self.arguments = None
        wanted = self.config.get("matmul_precision")
        self.precision = precision.resolve(meta.get("matmul_precision", wanted))
        self.task.loader.set_state(data)
        step = int(np.max(self.state.step))
        if step > self.config.steps:
            raise ConfigError(
                f"the newest checkpoint is of step {step}, more than steps {self.config.steps}",
                "config.steps",
                f"set steps to {step} or more, or choose another --workdir",
            )
        print(f"resumed at step {step}", flush=True)
        return step

    def fresh(self):
        """The first state: initialised, or the parent's; copied where experts are stacked."""
        if self.task.parent:
            make, arguments = branch.restarted, (branch.parent_state(self.task.parent, self.one),)
        else:
            make, arguments = self.make, self.arguments
        if self.task.experts:
            make = branch.copies(make, self.task.experts)
        return jax.jit(make, out_shardings=self.placed)(*arguments)

    def batch(self, step):
        """The encoded batch of `step`."""
        raw = {k: v for k, v in next(self.task.loader).items() if is_numeric(v)}
        raw = sharding.put_batch(raw, self.mesh)
        return self.encode(self.encoders, raw, jax.random.fold_in(self.key_encode, step))

    def save(self, step, checkpoints):
        meta = {
            "config": plain(self.config),
            "mesh": dict(self.mesh.shape),
            "matmul_precision": self.precision,
        }
        checkpoints.save(step, self.state, self.task.loader.get_state(), meta)

    def parameters(self):
        """How many numbers are trained and how many stay; of experts, all of them."""
        return {"trained": trees.size(self.state.params), "frozen": trees.size(self.frozen)}

    def train(self, start, checkpoints, writer, stop):
        """Steps `start` to `config.steps`, saving as it goes and at the end."""
        config, number = self.config, self.parameters()["trained"]
        on = f"{self.mesh.size} device{'s' if self.mesh.size > 1 else ''}"
        print(f"{number:,} parameters to train on {on}", flush=True)
        if start < config.steps:
            print("compiling, a minute or more", flush=True)
        if self.task.sample is not None and config.sample_every > config.steps:
            print(f"no samples are drawn: sample_every is {config.sample_every}", flush=True)
        progress = Progress(config, start, writer)
        with progress:
            for step in range(start + 1, config.steps + 1):
                batch = self.batch(step - 1)
                self.state, metrics = self.step(self.state, self.frozen, batch, self.key_step)
                progress.push(step, self.summary(metrics))
                stopping = stop.requested(step)
                if stopping or step % config.save_every == 0 or step == config.steps:
                    progress.flush()  # a bad step raises here and is not saved
                    self.save(step, checkpoints)
                if step % config.sample_every == 0:
                    self.sample(step, writer)
                if stopping:
                    checkpoints.wait()
                    raise Stopped(
                        f"stopped by {stop.name} at step {step}; the state was saved",
                        checkpoints.directory,
                        "start again with --resume to go on",
                    )
        checkpoints.wait()

    def sample(self, step, writer):
        """A picture, on one process only: elsewhere the parameters are spread over hosts."""
        if self.task.sample is not None and jax.process_count() == 1:
            writer.image(step, self.task.sample(self.state.ema, self.frozen, self.encoders))

    def finish(self, workdir, lead):
        """Writes `export/`, all of it or nothing."""
        if self.task.export is None:
            return
        parts = sharding.whole((self.state.ema, self.frozen, self.encoders), keep=lead)
        if not lead:
            return
        temporary = workdir / "export.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.task.export(*parts, temporary)
        temporary.replace(workdir / "export")
        print(f"written: {workdir / 'export'}", flush=True)
        shutil.rmtree(workdir / OLD_EXPORT, ignore_errors=True)


def is_numeric(value):
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"

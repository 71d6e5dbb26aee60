"""A run's directory: the config that is stored in it, and what may be gone on with."""

import json
import pathlib
import shutil

from cnxs_jax import checkpoint
from cnxs_jax import tree as trees
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.storage import fill

MAY_CHANGE = ("steps", "log_every", "save_every", "sample_every", "max_to_keep", "mesh", "rules",
              "resume", "report")  # fmt: skip
OLD_EXPORT = "export.old"  # while a finished run goes on
PARAMETERS = "parameters.json"  # how many a run trains, and how many stay


def expand(config, root):
    """A copy of `config` whose strings have `{workdir}` and `{assets}` filled in."""
    return type(config)(fill(config.to_dict(), root))


def plain(config):
    """`config` as JSON would give it back."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def check_workdir(path, config, root, resume):
    """Whether the run in `path` is finished; refuses what cannot be started or gone on with.

    Raises:
        CheckpointError: a used directory without `resume`, or a finished run that shall go on and
            has no checkpoints any more.
        ConfigError: another configuration, or fewer steps than the finished run has.
    """
    steps, exported = checkpoint.saved_steps(path / "checkpoints"), (path / "export").is_dir()
    if steps and not resume:
        raise CheckpointError(
            f"contains steps {steps[0]}..{steps[-1]} of an earlier run",
            path / "checkpoints",
            "add --resume to go on with it, or choose another --workdir",
        )
    if not steps and any((path / "checkpoints").glob("*.corrupt")):
        raise CheckpointError(
            "every step of an earlier run was damaged and set aside",
            path / "checkpoints",
            "choose another --workdir, or delete this one to begin anew",
        )
    file = path / "config.json"
    if not (steps or exported) or not file.is_file():
        return exported
    stored = json.loads(file.read_text())
    check_same(stored, config, file, root)
    if not exported or config.steps == stored["steps"]:
        return exported
    if config.steps < stored["steps"]:
        raise ConfigError(
            f"the run finished after {stored['steps']} steps, more than steps {config.steps}",
            file,
            f"set steps to {stored['steps']} or more, or choose another --workdir",
        )
    if not steps:
        raise CheckpointError(
            f"no checkpoint to go on from {stored['steps']} to {config.steps} steps",
            path / "checkpoints",
            "choose another --workdir",
        )
    return False


def check_same(stored, config, where, root):
    """Raises ConfigError if what decides the result differs from the stored config.

    Both have their paths filled in with today's `root`, so that a directory may be moved.
    """

    def deciding(value):
        value = fill(value, root)
        return trees.flatten({k: v for k, v in value.items() if k not in MAY_CHANGE})

    old, new = deciding(stored), deciding(plain(config))
    differ = [
        f"{k}: {old.get(k)!r} then, {new.get(k)!r} now"
        for k in sorted({*old, *new})
        if old.get(k) != new.get(k)
    ]
    if differ:
        raise ConfigError(
            f"the run was started with another configuration: {'; '.join(differ[:5])}",
            where,
            "resume it with the same configuration, or choose another --workdir",
        )


def check_branches(runs, finished, root):
    """Refuses to train a parent further under branches that have started from it.

    Args:
        runs: `(directory, config)` of the stages of a plan.
        finished: of each, as `check_workdir` says.

    Raises:
        ConfigError: the branches would stay those of another state of the parent.
    """
    done = {path: there for (path, _), there in zip(runs, finished, strict=True)}
    steps = {path: checkpoint.saved_steps(path / "checkpoints") for path, _ in runs}
    going = {
        path: config.steps
        for path, config in runs
        if not done[path] and max(steps[path], default=0) < config.steps
    }
    for path, config in runs:
        parent = config.get("parent") and pathlib.Path(fill(config.parent, root)).absolute()
        if parent in going and (steps[path] or done[path]):
            raise ConfigError(
                f"{path.name} started from {parent.name}, which has "
                f"{max(steps[parent], default=0)} of {going[parent]} steps and would go on",
                f"config.{parent.name}.steps",
                f"leave the steps as they were, give {parent} back what it lost, or choose "
                "another --workdir",
            )


def set_aside(workdir):
    """Takes the result of fewer steps out of the way before `config.json` says more of them.

    Otherwise a run that is stopped here would look finished. `Fit.finish` deletes it.
    """
    export = workdir / "export"
    if export.is_dir():
        shutil.rmtree(workdir / OLD_EXPORT, ignore_errors=True)
        export.replace(workdir / OLD_EXPORT)
        (workdir / "report.md").unlink(missing_ok=True)  # or `report.write` would keep it

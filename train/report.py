"""What a finished run shows: `report.md` and `report.json`, made by `eval` with fewer pictures.

`config.report` says how much is drawn: a run's own report takes a minute or two, the full figures
come from `python -m eval --config=... --workdir=...`. A run on a user's own pictures has none:
only scenes have a truth to compare with.
"""

import json

from cnxs_jax.data.pipeline import WORLDS
from cnxs_jax.errors import ConfigError
from train import validate
from train.workdir import PARAMETERS

OF_STUDENTS = ("reference_steps", "solvers")


def check(config):
    """Raises ConfigError if the run asks for a report that its data cannot have; before training.

    `config.report.num_prompts = 0` asks for none.
    """
    if not wanted(config):
        return
    from eval import measures, recipe  # heavy, and of no use to a run without a report

    given = config.report.to_dict()
    metrics = given.get("metrics") or measures.USUAL
    if recipe.trains_controller(config):
        for key in OF_STUDENTS:
            if given.get(key) is not None:
                what = f"a controller has no {key}, which are a teacher's"
                raise ConfigError(what, f"config.report.{key}", "leave it out")
    try:
        recipe.scenes_of(config, metrics)
        numbers = given["num_prompts"], given["num_real"]
        measures.check_numbers(metrics, *numbers, "config.report")
    except ConfigError as error:
        fix = "train without a report: --config.report.num_prompts=0"
        raise ConfigError(f"no report can be made: {error.what}", error.where, fix) from None


def wanted(config):
    """Whether the run shall have a report."""
    asked = bool(config.get("report")) and config.report.num_prompts > 0
    return asked and (config.get("data") or {}).get("source", "emoji_scenes") in WORLDS


def write(config, workdir):
    """The report of a run that asks for one and has none yet; its path, or None.

    Args:
        config: the run's; `config.report` holds keyword arguments of `eval.run.main`, or of
            `eval.controlled.main`, which draws a row for each of `steps`.
        workdir: with `export/` and `metrics.jsonl`.
    """
    if not wanted(config) or (workdir / "report.md").is_file():
        return None
    from eval import controlled, recipe, run  # heavy, and of no use to a run without a report

    options = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config.report).items()}
    evaluate = run.main
    if recipe.trains_controller(config):
        evaluate, options["sweep"] = controlled.main, [("steps", options.pop("steps"))]
    options = {k: v for k, v in options.items() if v is not None}
    summary = costs(config, workdir)
    # Newer weights draw again what older ones drew; other processes are not here.
    return evaluate(
        config, workdir, out=workdir, summary=summary, redraw=True, alone=True, **options
    )


def finish(config, root, again):
    """Calls `config.finish.task`, "module:function", which joins the stages: `(config, root)`.

    Args:
        again: whether a stage went on since; what was joined before is kept otherwise.
    """
    if again or not (root / "report.md").is_file():
        validate.function_of(config.finish.task)(config, root)


def costs(config, workdir):
    """What the training took, from the run's own `metrics.jsonl`."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    rates = [m["images_per_second"] for m in logged if m.get("images_per_second")]
    images = config.steps * config.batch_size
    rate = sorted(rates)[len(rates) // 2] if rates else None
    sizes = {}
    if (workdir / PARAMETERS).is_file():
        found = json.loads((workdir / PARAMETERS).read_text())
        sizes = {f"{kind} parameters": number for kind, number in found.items()}
    return sizes | {
        "training steps": config.steps,
        "training images": images,
        "images/s (median)": rate and round(rate, 1),
        "training minutes": rate and round(images / rate / 60, 1),
        "final loss": logged[-1]["loss"],
    }

"""What a finished run shows: `report.md` and `report.json`, made by `eval` with fewer pictures.

`config.report` says how much is drawn: a run's own report takes a minute or two, the full figures
come from `python -m eval --config=... --workdir=...`.
"""

import json

from train import validate


def write(config, workdir):
    """The report of a run that asks for one and has none yet; its path, or None.

    Args:
        config: the run's; `config.report` holds the keyword arguments of `eval.run.main`.
        workdir: with `export/` and `metrics.jsonl`.
    """
    if not config.get("report") or (workdir / "report.md").is_file():
        return None
    from eval import run  # heavy, and of no use to a run without a report

    options = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(config.report).items()}
    return run.main(config, workdir, out=workdir, summary=costs(config, workdir), **options)


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
    return {
        "training steps": config.steps,
        "training images": images,
        "images/s (median)": rate and round(rate, 1),
        "training minutes": rate and round(images / rate / 60, 1),
        "final loss": logged[-1]["loss"],
    }

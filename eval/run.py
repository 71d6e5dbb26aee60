"""The evaluation: makes each row's pictures once, measures them all, writes the report.

The heart is independent of models: `evaluate(make, ...)` takes any `make(row, prompts) -> uint8
[N, H, W, 3]`. Pictures are kept a row (`draw.cached`), so a run that was stopped goes on where it
was, and metrics can be added without drawing again.
"""

from pathlib import Path

import cnxs_jax
from cnxs_jax import precision
from cnxs_jax.errors import ConfigError, DataError, did_you_mean
from eval import pictures, plan, recipe, report
from eval.draw import cached, identity, pipeline_generator, round_trip
from eval.metrics import agreement, features, scene_accuracy
from eval.metrics.kid import kid

METRICS = ("scene_accuracy", "kid", "agreement")
SHOWN = 8  # prompts in the picture grid
REAL_SEED = 1  # the real scenes that KID compares with; prompts come from seed 0
ACCURACY = ("objects", "style", "background", "relation", "all_correct")
# The report's tables; columns that are named nowhere come last.
LEAD = ("method", "steps", "evaluations")
GROUPS = (
    (*LEAD, *ACCURACY, "extra_objects"),
    (*LEAD, "kid_efflite0", "sharpness", "rmse", "psnr", "same_verdicts"),
    (*LEAD, "held-out pair: object", "held-out pair: style", "held-out pair: all correct"),
    (*LEAD, "held-out relation", "held-out relation: all correct"),
)
PLOTTED = {
    "objects": "objects found",
    "all_correct": "all correct",
    "kid_efflite0": "KID (EfficientNet-Lite0), lower is better",
    "sharpness": "sharpness (1 = real scenes)",
}


def check_metrics(metrics):
    """The metrics asked for, as a tuple; ConfigError names an unknown one."""
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(
                f"unknown metric {name!r}.{did_you_mean(name, METRICS)}",
                "--metrics",
                f"one or more of {','.join(METRICS)}",
            )
    return tuple(metrics)


def evaluate(make, rows, sets, real, metrics=METRICS, read=None, extract=None,
             ceilings=None):  # fmt: skip
    """Measures all rows.

    Args:
        make: `make(row, prompts) -> uint8 images`, such as `cached(...)`.
        rows: `plan.Row`s; the first one is the reference for the agreement.
        sets: {"test": Prompts, ...}; every split but "test" gives accuracy columns of its own.
        real: uint8 `[M, H, W, 3]` real scenes other than the prompts'.
        metrics: of METRICS.
        read: scene checker, `scene_accuracy.load_checker()` by default.
        extract: feature extractor; None where its weights are not installed: KID "not run".
        ceilings: {name: function of the prompts' own scenes}, such as a VAE's round trip, measured
            after the scenes themselves and before the rows.

    Returns:
        list of report rows; the first is the test prompts' own real scenes.
    """
    if not len(real) or "test" not in sets:
        raise DataError("an evaluation needs real scenes and a test set", "eval")
    metrics = check_metrics(metrics)
    accurate = set(recipe.CHECKED) & set(metrics)
    read = scene_accuracy.load_checker() if accurate and read is None else read
    real_features = extract(real) if extract and "kid" in metrics else None
    tools = (read if accurate else None, extract, real, real_features)
    ceilings = {"real scenes": lambda images: images} | (ceilings or {})
    table = []
    for name, change in ceilings.items():
        own = {split: change(p.images) for split, p in sets.items()}
        line = {"method": name, "steps": None, "evaluations": None}
        table.append(line | _measure(own, sets, metrics, *tools)[0])
    reference = None
    for row in rows:
        made = {split: make(row, p) for split, p in sets.items()}
        line = {"method": row.method, "steps": row.steps, "evaluations": row.evaluations}
        figures, verdicts = _measure(made, sets, metrics, *tools)
        reference = reference or (made["test"], verdicts)
        if "agreement" in metrics:
            figures |= agreement.pixel_agreement(made["test"], reference[0])
            figures["same_verdicts"] = agreement.verdict_agreement(verdicts, reference[1])
        table.append(line | figures)
    return table


def _measure(images, sets, metrics, read, extract, real, real_features):
    """(figures, verdicts on the test prompts) of {split: images}."""
    out, verdicts = {}, None
    if read is not None:
        figures, verdicts = scene_accuracy.score(read, images["test"], sets["test"].facts)
    if "scene_accuracy" in metrics:
        out |= {k: figures[k] for k in (*ACCURACY, "extra_objects") if k in figures}
        for split in [s for s in sets if s != "test"]:
            out |= _split_figures(read, images[split], sets[split])
    if "kid" in metrics:
        out["kid_efflite0"] = _kid(extract, images["test"], real_features)
    if "agreement" in metrics:
        out["sharpness"] = agreement.sharpness(images["test"], real)
    return out, verdicts


def _kid(extract, images, real_features):
    if extract is None:
        return f"not run ({features.INSTALL})"
    return kid(extract(images), real_features).as_dict()


def _split_figures(read, images, prompts):
    """Columns of a held-out split; of pairs, only the held-out object itself and its style."""
    figures, verdicts = scene_accuracy.score(read, images, prompts.facts)
    if prompts.split == "heldout_pairs":
        rows = [
            {"object 0": v[f"object {f['concepts'].index(c)}"], "style": v["style"]}
            for v, f, c in zip(verdicts, prompts.facts, prompts.heldout, strict=True)
        ]
        own = scene_accuracy.summarise(rows)
        return {
            "held-out pair: object": own["objects"],
            "held-out pair: style": own["style"],
            "held-out pair: all correct": figures["all_correct"],
        }
    if prompts.split == "heldout_relations":
        return {
            "held-out relation": figures["relation"],
            "held-out relation: all correct": figures["all_correct"],
        }
    return {f"{prompts.split}: all correct": figures["all_correct"]}


def write(workdir, table, rows, make, prompts, notes=(), title="Evaluation", summary=None):
    """`report.md`, `report.json` and the pictures: samples side by side, then the curves."""
    columns = [("a real scene\nfor the prompt", prompts.images[:SHOWN])]
    head = plan.Prompts(*(v if isinstance(v, str) else v[:SHOWN] for v in vars(prompts).values()))
    for row in shown_rows(rows):
        columns.append((_heading(row), make(row, prompts)[:SHOWN]))
    grid = pictures.sample_grid(columns, head.captions)
    made = [
        report.Picture("samples", grid, "The same prompts and the same noise, by method and steps.")
    ]
    references = [r.method for r in rows if r.steps == max(x.steps for x in rows)]
    curves = pictures.quality_plot(
        [line for line in table if line["evaluations"]], PLOTTED, references
    )
    if curves is not None:
        made.append(
            report.Picture(
                "quality", curves, "Quality against network evaluations, with 95 % intervals."
            )
        )
    return report.write_report(workdir, table, made, title=title, summary=summary, notes=notes,
                               groups=GROUPS)  # fmt: skip


def _heading(row):
    solver = row.method.removeprefix(row.model).split(",")[0].strip() or "consistency"
    steps = f"{row.steps} {'guided ' * row.guided}step{'s' * (row.steps > 1)}"
    evaluations = f"{row.evaluations} evaluation{'s' * (row.evaluations > 1)}"
    return "\n".join((row.model, solver, steps, evaluations))


def shown_rows(rows):
    """Columns of the picture grid: the reference, the teacher with 4 evaluations, the student."""
    teacher = [r for r in rows if r.model == "teacher"]
    few = [r for r in teacher if r.evaluations == 4]
    return [*teacher[:1], *few, *(r for r in rows if r.model == "student")]


def notes(num_prompts, num_real, guidance_scale):
    """The sentences below the table."""
    scale = "the pipeline's default" if guidance_scale is None else f"{guidance_scale:g}"
    out = [
        f"{num_prompts} held-out prompts, the same noise in every row; guidance scale {scale}. "
        "An evaluation is one pass of one picture through the network: a guided step needs two. "
        "In brackets: 95 % intervals; *chance* is the same figure with the prompts shuffled among "
        "the pictures.",
        f"KID (cubic kernel, EfficientNet-Lite0 features at 128 px) is against {num_real} real "
        "scenes of the test split; it is unbiased, so that it may be negative. Agreement (rmse, "
        "psnr, same_verdicts) is with the first generated row. Sharpness is gradient energy "
        "relative to real scenes.",
    ]
    if num_prompts < 1000:
        out.append(f"KID of {num_prompts} pictures: fewer than the 1000 that a claim needs.")
    return out


def main(config, workdir, *, metrics=METRICS, num_prompts=512, num_real=2000, steps=(1, 2, 4, 8),
         reference_steps=50, solvers=tuple(plan.SCHEDULERS), guidance_scale=None, teacher=None,
         student=None, batch_size=None, seed=0, out=None, summary=None):  # fmt: skip
    """Evaluates a run (see `python -m eval --help`) and returns the path of the report.

    Args:
        config: the run's; of one with `stages` the last stage is evaluated. Prompts and real scenes
            are those of its `data` (source, size, num_concepts), held out of training.
        workdir: the run's, the one that was given to training.
        out: directory of the report, `workdir`/eval by default. Training's own short report is the
            same call with fewer prompts and `out=workdir`.
        solvers: names in `plan.SCHEDULERS` for the teacher's rows.
        batch_size: pictures drawn at once; by default one that all prompt sets fill, up to 64.
        summary: figures to print below the tables, such as the training cost.

    Raises:
        ConfigError, DataError, CheckpointError: before any device work where possible.
    """
    metrics = check_metrics(metrics)
    places = recipe.directories(config, workdir, teacher, student)
    config, _ = recipe.last_stage(config, workdir)
    world, size = recipe.scenes_of(config, metrics)
    rows = plan.rows(steps, reference_steps, "student" in places, solvers)
    who = {name: identity(path) for name, path in places.items()}
    held_out = max(num_prompts // 4, 1)
    numbers = {"test": num_prompts, "heldout_pairs": held_out, "heldout_relations": held_out}
    sets = {split: plan.prompts(world, split, n, seed, size) for split, n in numbers.items()}
    batch_size = batch_size or min(held_out, 64)
    real = plan.prompts(world, "test", num_real, seed + REAL_SEED, size).images
    if guidance_scale is None and "objective" in config and "omega" in config.objective:
        guidance_scale = 1.0 + config.objective.omega  # the (1 + omega) form of the LCM papers
    pipes = {name: cnxs_jax.load_pipeline(path) for name, path in places.items()}
    out = Path(workdir) / "eval" if out is None else Path(out)
    generate = pipeline_generator(pipes, guidance_scale, batch_size)
    make = cached(generate, out / "eval_rows", [who, guidance_scale], seed)
    wanted = "kid" in metrics and features.weights_path() is not None
    extract = features.extractor() if wanted else None
    vae = pipes["teacher"].components["vae"]
    ceilings = {"real scenes through the VAE": round_trip(vae.module, vae.params, batch_size)}
    with precision.matmul(config.get("matmul_precision")):
        table = evaluate(make, rows, sets, real, metrics, extract=extract, ceilings=ceilings)
    sentences = notes(num_prompts, num_real, guidance_scale)
    path = write(out, table, rows, make, sets["test"], sentences, summary=summary)
    print(report.table(table))
    print(path)
    return path

"""The evaluation of a controller's run: `python -m eval --config=... --workdir=RUN`.

Its metrics are those of `measures.CONTROL` beside the usual ones: what is drawn with control
pictures of held-out scenes, against the exact truth of those scenes.
"""

import dataclasses
from pathlib import Path

import cnxs_jax
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import control as controls
from eval import draw, measures, plan, recipe, run, show


def main(config, workdir, *, out=None, sweep=(), steps=None, guidance_scale=None, summary=None,
         **options):  # fmt: skip
    """Evaluates a controller on held-out scenes; the path of the report.

    The rows are the base alone and, with the same noise, the base with the controller, at one
    setting or over a sweep.

    Args:
        config, workdir: of the run (`recipe.controller`), the ones that were given to training.
        out: directory of the report, `workdir`/eval by default.
        sweep: [(key, values)] of `plan.parse_sweep`.
        steps, guidance_scale: where not swept; None: the base pipeline's own.
        summary: figures to print below the tables, such as the training cost.
        options: of `run.Options`.

    Raises:
        ConfigError, DataError, CheckpointError: before any device work where possible.
    """
    options = run.Options(**options)
    metrics = options.metrics or (*measures.CONTROL, *measures.USUAL)
    out = Path(workdir) / "eval" if out is None else Path(out)
    base, adapter, hint, weights = recipe.controller(config, workdir)
    config, _ = recipe.last_stage(config, workdir)
    world, size = recipe.scenes_of(config, metrics)
    measures.check_numbers(metrics, options.num_prompts)
    if not Path(adapter).is_dir():
        raise ConfigError("the run has no controller yet", adapter, "finish its training")
    digest = draw.identity(base)
    plain = cnxs_jax.load_pipeline(base, mesh=draw.local_mesh())
    compat = (config.get("control") or {}).get("compat") or "official"
    trained = controls.read_controller(adapter, dtype=None, compat=compat)
    pipes = {"base": plain, "controller": plain.replace(control=trained)}
    sets = run.scene_sets(world, size, options, metrics, hint, weights)
    run.check_size(plain, sets["test"])
    own_steps, own_scale = plain.defaults()
    steps = own_steps if steps is None else steps
    guidance_scale = own_scale if guidance_scale is None else guidance_scale
    batch = options.batch_size or min(options.num_prompts, 64)
    vae = plain.components["vae"]
    ceilings = {
        "real scenes": lambda images: images,
        "real scenes through the VAE": draw.round_trip(vae.module, vae.params, batch),
    }
    keys = tuple(key for key, _ in sweep)
    told = "as in the table" if "guidance_scale" in keys else f"{guidance_scale:g}"
    doubled = not plain.guidance_is_input
    planned = plan.Plan(
        "Evaluation of a controller", rows(sweep, steps, guidance_scale, doubled), sets,
        run.references(options, world, size), ceilings=ceilings,
        axis=(*keys, "evaluations")[0], swept=keys,
        notes=notes(options, metrics, told, hint),
    )  # fmt: skip
    generate = draw.pipeline_generator(pipes, None, batch)
    who = {"base": digest, "controller": f"{digest} {draw.digest_of(adapter)}"}
    gallery = draw.Gallery(
        generate, out / run.ROWS, {"pipeline": who}, options.seed, batch, options.redraw
    )
    matmul = config.get("matmul_precision")
    return run.finish(
        planned, gallery, options, out, metrics=metrics, matmul=matmul, summary=summary
    )


def rows(sweep, steps, guidance_scale, doubled=True):
    """The base alone, then the controller, over the same values."""
    swept = plan.sweep_rows(sweep, steps, guidance_scale, doubled)
    return tuple(
        dataclasses.replace(row, model=model, method=row.method.replace("pipeline", name))
        for name, model in (("base without control", "base"), ("controller", "controller"))
        for row in swept
    )


def notes(options, metrics, guidance_scale, hint):
    """The sentences below the tables."""
    usual = show.notes(
        options.num_prompts, options.num_real, guidance_scale, metrics, options.features
    )
    return (*usual, show.CONTROL_NOTE.format(hint))

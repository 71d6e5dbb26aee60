"""`python -m eval`: figures with intervals, of a run, of a pipeline, or of folders of pictures.

  python -m eval --config=configs/pixart_lcm.py --workdir=RUN
      the comparison: the student and its teacher on held-out prompts, at equal cost
  python -m eval --config=configs/pixart_lcm.py --workdir=RUN --sweep guidance_scale=1:8
      the run's result over a setting; --sweep may be given again, for more lines
  python -m eval --config=configs/controlnet_xs.py --workdir=RUN --metrics=control_edges
      a controller's run: what it draws against the exact truth of held-out scenes, beside its base
  python -m eval --pipeline=DIR --prompts=prompts.txt --reference=photos --out=OUT \\
      --metrics=fid,clip_score --weights inception=FILE --weights clip=DIR \\
      --sweep guidance_scale=1:8
  python -m eval --images=A --reference=B --metrics=kid,ssim,lpips --out=OUT

Writes report.md (pictures first), report.json and the pictures to RUN/eval or --out. A stopped
evaluation goes on where it was: pictures that exist are not made again, and pictures of other
settings are refused. Of a config with stages the last one is evaluated. Several devices share each
batch; several hosts (--distributed) share the pictures, in a directory that all of them see.
"""

import math
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from cnxs_jax import errors
from cnxs_jax.storage import check_directory
from eval import controlled, measures, networks, plan, recipe, run

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe of the run, e.g. configs/pixart_lcm.py:tiny."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the report goes to eval/.")
PIPELINE = flags.DEFINE_string(
    "pipeline", None, "Pipeline directory to evaluate, instead of a run."
)
IMAGES = flags.DEFINE_string("images", None, "Folder of pictures to evaluate, instead of a run.")
REFERENCE = flags.DEFINE_string(
    "reference", None, "Real pictures: a folder, or an .npz with mu and sigma for fid and fd."
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "Prompts: a text file, one a line, or a folder of pictures with captions."
)
SIZE = flags.DEFINE_integer(
    "size", None, "Side in px to which pictures of folders are cut.", lower_bound=1
)
OUT = flags.DEFINE_string("out", None, "Directory of the report; default: WORKDIR/eval.")
METRICS = flags.DEFINE_list(
    "metrics",
    None,
    f"What to measure: {', '.join(measures.METRICS)}. Default: what can be of "
    f"{', '.join(measures.USUAL)}.",
)
SWEEP = flags.DEFINE_multi_string(
    "sweep", [], f"A setting and its values: {', '.join(plan.EXAMPLES.values())}."
)
WEIGHTS = flags.DEFINE_multi_string(
    "weights", [], f"name=PATH of a metric's network: {', '.join(networks.FILES)}."
)
FEATURES = flags.DEFINE_string(
    "features", "efflite0", f"Network of fd, kid, mmd and prdc: {', '.join(networks.FEATURES)}."
)
NUM_PROMPTS = flags.DEFINE_integer(
    "num_prompts", 512, "Prompts a row (KID claims: >= 1000).", lower_bound=1
)
NUM_REAL = flags.DEFINE_integer(
    "num_real", 2000, "Real scenes that distributions compare with.", lower_bound=1
)
STEPS = flags.DEFINE_list(
    "steps", None, "Student's steps in the comparison (1,2,4,8), or a pipeline's one number."
)
REFERENCE_STEPS = flags.DEFINE_integer(
    "reference_steps", 50, "Guided steps of the teacher at its best.", lower_bound=1
)
GUIDANCE = flags.DEFINE_float(
    "guidance_scale", None, "Default: of a teacher 1 + the config's omega, of a pipeline its own.",
    lower_bound=0,
)  # fmt: skip
flags.register_validator(GUIDANCE, lambda v: v is None or math.isfinite(v), "expected a number")
TEACHER = flags.DEFINE_string("teacher", None, "Pipeline directory; default: the config's.")
STUDENT = flags.DEFINE_string(
    "student", None, "Pipeline directory; default: RUN/export, if RUN distilled a teacher."
)
BATCH = flags.DEFINE_integer("batch_size", None, "Pictures drawn at once.", lower_bound=1)
SEED = flags.DEFINE_integer(
    "seed", 0, "Of noise and prompts.", lower_bound=0, upper_bound=2**32 - 1
)
REDRAW = flags.DEFINE_bool("redraw", False, "Draw again what was made with other settings.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several hosts, in a cluster JAX knows.")


def whole_numbers(words):
    """The list of `--steps` as positive integers."""
    try:
        return tuple(plan.count(w.strip()) for w in words)
    except ValueError as error:
        raise errors.ConfigError(str(error), "--steps", "1,2,4,8") from None


def options():
    """`run.Options` of the flags; a mistake in them is found here, before anything is read."""
    return {
        "metrics": None if METRICS.value is None else tuple(METRICS.value),
        "weights": networks.parse_weights(WEIGHTS.value),
        "features": FEATURES.value,
        "num_prompts": NUM_PROMPTS.value,
        "num_real": NUM_REAL.value,
        "batch_size": BATCH.value,
        "reference": REFERENCE.value,
        "prompts": PROMPTS.value,
        "size": SIZE.value,
        "seed": SEED.value,
        "redraw": REDRAW.value,
    }


def what():
    """Which of the three is evaluated; ConfigError where the flags name none or several."""
    given = {
        "--pipeline": PIPELINE.value,
        "--images": IMAGES.value,
        "--config and --workdir": CONFIG.value is not None and WORKDIR.value,
    }
    named = [name for name, value in given.items() if value]
    if PIPELINE.value and CONFIG.value is not None:
        named = ["--pipeline"]  # the config says which scenes it draws
    if len(named) != 1:
        found = " and ".join(named) or "nothing"
        fix = "--config=... --workdir=RUN, --pipeline=DIR, or --images=A --reference=B"
        raise errors.ConfigError(f"{found} to evaluate, expected one", "command line", fix)
    return named[0]


def directory():
    """Where the report goes."""
    if not (OUT.value or WORKDIR.value):
        raise errors.ConfigError("no directory for the report", "--out", "--out=DIR")
    place = Path(OUT.value) if OUT.value else Path(WORKDIR.value) / "eval"
    check_directory(place, "--out" if OUT.value else "--workdir")
    return place


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    logging.set_verbosity(logging.WARNING)  # JAX says at length which backends are not there
    sweep = [plan.parse_sweep(text) for text in SWEEP.value]
    kind, out, given = what(), directory(), options()
    steps = whole_numbers(STEPS.value) if STEPS.value else None
    of_run = kind == "--config and --workdir"
    control = of_run and recipe.controller(CONFIG.value, WORKDIR.value)
    if (sweep or kind == "--pipeline" or control) and steps and len(steps) > 1:
        fix = f"--sweep steps={','.join(STEPS.value)}"
        raise errors.ConfigError(f"{len(steps)} numbers of steps", "--steps", fix)
    one = steps[0] if steps else None
    if DISTRIBUTED.value:
        _start_cluster()
    if kind == "--images":
        if sweep:
            raise errors.ConfigError("pictures have no settings to sweep", "--sweep")
        run.folders_of_pictures(IMAGES.value, REFERENCE.value, out, run.Options(**given))
    elif kind == "--pipeline":
        run.pipeline(PIPELINE.value, out, run.Options(**given), sweep, one, GUIDANCE.value,
                     config=CONFIG.value, workdir=WORKDIR.value)  # fmt: skip
    elif control:
        controlled.main(CONFIG.value, WORKDIR.value, out=out, sweep=sweep, steps=one,
                        guidance_scale=GUIDANCE.value, **given)  # fmt: skip
    else:
        run.main(
            CONFIG.value,
            WORKDIR.value,
            steps=steps or (1, 2, 4, 8),
            reference_steps=REFERENCE_STEPS.value,
            guidance_scale=GUIDANCE.value,
            teacher=TEACHER.value,
            student=STUDENT.value,
            sweep=sweep,
            out=out,
            **given,
        )
    return 0


def _start_cluster():
    import jax

    try:
        jax.distributed.initialize()
    except Exception as error:
        raise errors.DistributedError(
            f"the cluster did not come up: {errors.first_line(error)}",
            "--distributed",
            "start one process a host, on a cluster that JAX knows",
        ) from error


if __name__ == "__main__":
    errors.run_app(main)

"""`python -m eval --config=configs/X.py[:variant] --workdir=RUN`: the figures of a finished run.

Compares the student with its teacher (or measures a teacher alone) on held-out prompts and writes
RUN/eval/report.md, report.json and the pictures. A stopped evaluation goes on where it was. Of a
config with stages the last one is evaluated (RUN/teacher/export of configs/pixart.py).
"""

from absl import flags
from ml_collections import config_flags

from cnxs_jax import errors
from eval import run

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe of the run, e.g. configs/pixart_lcm.py:tiny."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; the report goes to eval/.")
METRICS = flags.DEFINE_list("metrics", list(run.METRICS), "What to measure.")
NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 512, "Held-out prompts (KID claims: >= 1000).")
NUM_REAL = flags.DEFINE_integer("num_real", 2000, "Real scenes that KID compares with.")
STEPS = flags.DEFINE_list("steps", ["1", "2", "4", "8"], "Student's steps.")
REFERENCE = flags.DEFINE_integer("reference_steps", 50, "Guided steps of the teacher at its best.")
GUIDANCE = flags.DEFINE_float("guidance_scale", None, "Teacher's; default 1 + the config's omega.")
TEACHER = flags.DEFINE_string("teacher", None, "Pipeline directory; default: the config's.")
STUDENT = flags.DEFINE_string(
    "student", None, "Pipeline directory; default: RUN/export, if RUN distilled a teacher."
)
BATCH = flags.DEFINE_integer("batch_size", None, "Pictures drawn at once.", lower_bound=1)


def whole_numbers(words):
    """The list of a flag as integers."""
    try:
        return tuple(int(w) for w in words)
    except ValueError:
        raise errors.ConfigError(f"not whole numbers: {words}", "--steps", "1,2,4,8") from None


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    run.main(
        CONFIG.value,
        WORKDIR.value,
        metrics=METRICS.value,
        num_prompts=NUM_PROMPTS.value,
        num_real=NUM_REAL.value,
        steps=whole_numbers(STEPS.value),
        reference_steps=REFERENCE.value,
        guidance_scale=GUIDANCE.value,
        teacher=TEACHER.value,
        student=STUDENT.value,
        batch_size=BATCH.value,
    )
    return 0


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    flags.register_validator("workdir", bool, message="give a directory")
    errors.run_app(main)

"""`python -m eval.ediffi`: what eDiff-I claims, measured on a cascade of the embedded world.

  python -m eval.ediffi --cascade=runs/cascade/export --out=runs/ediffi_studies
      attention   attention to text against noise, and a prompt that is switched on the way
      painting    placement against the weight of painted words; of any pipeline of 64 px
      style       a reference picture's style; also of a PixArt with --style
      encoders    T5, CLIP or both, on short and long captions
  python -m eval.ediffi --study=experts --runs=runs/arms --seeds=0,1,2 \\
      --cascade=runs/cascade/export --out=runs/ediffi_studies
      experts against one shared model; trains what is missing

Writes OUT/<study>.json and OUT/<study>.png, and OUT/report.md of all that are there. A study that
was made with the same settings is not made again.
"""

import math
from pathlib import Path

from absl import flags, logging

import cnxs_jax
from cnxs_jax import errors
from cnxs_jax.storage import check_directory
from eval import study
from eval.draw import digest_of, identity
from eval.ediffi import attention, encoders, experts, painting, style

OF_A_CASCADE = {
    "attention": attention.study,
    "painting": painting.study,
    "style": style.study,
    "encoders": encoders.study,
}
GUIDED = {"painting", "experts"}  # can be drawn with other guidance
TITLES = {
    "experts": "(a) Experts against one shared model",
    "attention": "(b) Attention to text, and a prompt switched on the way",
    "painting": "(c) Painted words",
    "style": "(d) A reference picture's style",
    "encoders": "(e) Which encoder",
}
CASCADE = flags.DEFINE_string(
    "cascade", None, "Pipeline directory of a cascade to 64 px; for painting any pipeline's."
)
STYLE = flags.DEFINE_string(
    "style", None, "What reads reference pictures where --cascade is a PixArt: a run's export."
)
STUDY = flags.DEFINE_list(
    "study", list(OF_A_CASCADE), f"Which: {', '.join(OF_A_CASCADE)}, experts."
)
OUT = flags.DEFINE_string("out", "runs/ediffi_studies", "Directory of the figures.")
NUMBER = flags.DEFINE_integer("number", 256, "Pictures a row.", lower_bound=8)
SEED = flags.DEFINE_integer(
    "seed", 0, "Of questions and noise.", lower_bound=0, upper_bound=2**32 - 1
)
RUNS = flags.DEFINE_string("runs", "runs/ediffi_arms", "Directory of the arms' runs.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Training seeds of the arms.")
TRAIN = flags.DEFINE_integer(
    "steps", None, "Training steps of each stage, if not the recipe's.", lower_bound=1
)
ARMS = flags.DEFINE_list(
    "arms", ["two", "three", "shared"], f"Which of {', '.join(experts.ARMS)}; with the shared one."
)
CLIP = flags.DEFINE_string("clip_path", None, "CLIP of the arms; default: the shipped one.")
GUIDANCE = flags.DEFINE_list(
    "guidance", [], "Guidance scales to draw with, for painting and experts; default: its own."
)
REDO = flags.DEFINE_bool("redo", False, "Make a study again.")


def settings(name):
    """What decides the figures of a study, JSON-able."""
    who = identity(CASCADE.value) if CASCADE.value else None
    found = {"cascade": who, "number": NUMBER.value}
    if STYLE.value:
        found["style"] = digest_of(STYLE.value)
    if GUIDANCE.value:
        found["guidance"] = scales()
    if name == "painting":
        found["weights"] = [*painting.WEIGHTS, painting.SWAPPED]
    if name != "experts":
        return found | {"seed": SEED.value}
    made = [experts.config_of(arm, 0, CLIP.value, TRAIN.value) for arm in ARMS.value]
    recipes = [config.to_json() for config in made]
    return found | {
        "arms": ARMS.value,
        "seeds": SEEDS.value,
        "runs": RUNS.value,
        "recipes": study.digest(recipes),
    }


def opened(name):
    """The pipeline of a study, or None without --cascade."""
    if not CASCADE.value:
        return None
    pipe = cnxs_jax.load_pipeline(CASCADE.value, style=STYLE.value)
    if pipe.sizes(None, None)[0] != (64, 64):
        what, fix = "no pipeline that draws 64 px", "train configs/ediffi.py"
        raise errors.ConfigError(what, "--cascade", fix)
    able = name == "painting" or name == "style" and pipe.styled
    if not able and getattr(pipe, "stages", None) is None:
        fix = "train configs/ediffi.py" + (", or give --style, too" if name == "style" else "")
        raise errors.ConfigError(f"{name} needs a cascade", "--cascade", fix)
    return pipe


def function(name):
    """`() -> (figures, shown)` of a study."""
    more = (scales(),) if name in GUIDED else ()
    if name != "experts":
        return lambda: OF_A_CASCADE[name](opened(name), NUMBER.value, SEED.value, *more)
    runs = (RUNS.value, ARMS.value, study.check_seeds(SEEDS.value))
    return lambda: experts.study(*runs, opened(name), NUMBER.value, *more, CLIP.value, TRAIN.value)


def scales():
    """The numbers of --guidance."""
    try:
        found = [float(text) for text in GUIDANCE.value]
    except ValueError:
        found = [math.nan]
    if not all(0 <= scale < math.inf for scale in found) or len(set(found)) < len(found):
        raise errors.ConfigError(
            f"{','.join(GUIDANCE.value)} are no different scales", "--guidance", "--guidance=1,3,5"
        )
    return found


def check():
    """Raises ConfigError for unknown names and numbers that are none."""
    study.check_names(STUDY.value, [*OF_A_CASCADE, "experts"], "--study")
    study.check_names(ARMS.value, experts.ARMS, "--arms")
    study.check_seeds(SEEDS.value)
    if not CASCADE.value and STUDY.value != ["experts"]:
        raise errors.ConfigError("no pipeline to study", "--cascade", "--cascade=RUN/export")
    check_directory(OUT.value, "--out")
    if scales() and not CASCADE.value:
        raise errors.ConfigError("nothing is drawn", "--guidance", "--cascade=RUN/export")
    if scales() and not set(STUDY.value) <= GUIDED:
        raise errors.ConfigError(
            "not all of these studies can be drawn with it", "--guidance", "--study=painting"
        )
    if "experts" in STUDY.value:
        check_directory(RUNS.value, "--runs")


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    logging.set_verbosity(logging.ERROR)
    check()
    out = Path(OUT.value)
    for name in STUDY.value:
        study.make(out, name, settings(name), function(name), REDO.value)
    print(study.write(out, "eDiff-I on the embedded world", TITLES))
    return 0


if __name__ == "__main__":
    errors.run_app(main)

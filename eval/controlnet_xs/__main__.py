"""`python -m eval.controlnet_xs`: what ControlNet-XS claims, measured on the embedded world.

  python -m eval.controlnet_xs --runs=runs/xs_arms --seeds=0,1,2 --out=runs/xs_studies
      types         A, B and C and the original ControlNet: control, quality, what a step costs
      connections   what is lost when the connections of one resolution are cut (type B)
      bias          sizes of type B: hints of one thing, prompts of another
Trains what is missing: about 20 minutes an arm and seed on one core, wider arms longer. Writes
OUT/<study>.json and .png, and OUT/report.md of all that are there; a study that was made with the
same settings is not made again.
"""

from pathlib import Path

from absl import flags, logging

import cnxs_jax
from cnxs_jax import errors
from cnxs_jax.data import emoji_scenes
from cnxs_jax.pipelines.control import read_controller
from cnxs_jax.storage import check_directory, fill
from cnxs_jax.tree import size
from eval import measures, plan, study
from eval.controlnet_xs import arms, bias, connections
from eval.draw import identity

TITLES = {
    "types": "Types of control, and the original ControlNet",
    "connections": "Which connections matter",
    "bias": "Do larger controllers bias the base?",
}
COMPARED = {
    "types": ["A", "B", "C", "ControlNet"],
    "bias": ["B half", "B", "B double", "B quadruple", "ControlNet"],
}
STUDY = flags.DEFINE_list("study", list(TITLES), f"Which: {', '.join(TITLES)}.")
BASE = flags.DEFINE_string("base", None, "Pipeline directory of the base; default: the shipped.")
RUNS = flags.DEFINE_string("runs", "runs/xs_arms", "Directory of the arms' runs.")
OUT = flags.DEFINE_string("out", "runs/xs_studies", "Directory of the figures.")
ARMS = flags.DEFINE_list(
    "arms", None, f"Of the studies types and bias, some of {', '.join(arms.ARMS)}; default: theirs."
)
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Training seeds.")
TRAIN = flags.DEFINE_integer("steps", None, "Training steps, if not the recipe's.", lower_bound=1)
NUMBER = flags.DEFINE_integer("number", 256, "Pictures a row.", lower_bound=8)
REAL = flags.DEFINE_integer("num_real", 1000, "Real scenes for KID.", lower_bound=3)
REDO = flags.DEFINE_bool("redo", False, "Make a study again.")


def place():
    """Directory of the base."""
    return BASE.value or fill("{assets}/sd_tiny", ".")


def chosen(name):
    """The arms of a study."""
    return COMPARED[name] if ARMS.value is None else ARMS.value


def trained(arm):
    """The `Controller`s of an arm, one a seed, trained where they are missing."""
    seeds = study.check_seeds(SEEDS.value)
    arms.train(RUNS.value, [arm], seeds, BASE.value, TRAIN.value)
    paths = [arms.directory(RUNS.value, arm, seed) / "export" / "controlnet" for seed in seeds]
    return [read_controller(path, compat="official") for path in paths]


def types():
    """The comparison of the types."""
    seeds = study.check_seeds(SEEDS.value)
    return arms.study(
        RUNS.value, chosen("types"), seeds, BASE.value, NUMBER.value, REAL.value, steps=TRAIN.value
    )


def which_connections():
    """Type B with some connections cut; the first training seed."""
    pipe = cnxs_jax.load_pipeline(place()).replace(control=trained("B")[0])
    prompts = plan.prompts(emoji_scenes.world(), "test", NUMBER.value, hint=arms.HINT)
    found, shown = connections.study(pipe, prompts)
    note = f"Intervals are of the pictures, of one controller: training seed {SEEDS.value[0]}."
    return found | {"notes": [note]}, shown


def biased():
    """Sizes of type B beside the original."""
    found = {}
    for arm in chosen("bias"):
        for seed, one in zip(SEEDS.value, trained(arm), strict=True):
            found[f"{arm}, seed {seed}"] = one, size(one.params)
    return bias.study(cnxs_jax.load_pipeline(place()), found, NUMBER.value)


FUNCTIONS = {"types": types, "connections": which_connections, "bias": biased}


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    logging.set_verbosity(logging.ERROR)
    study.check_names(STUDY.value, TITLES, "--study")
    if ARMS.value is not None:
        study.check_names(ARMS.value, arms.ARMS, "--arms")
        if not set(STUDY.value) & set(COMPARED):
            raise errors.ConfigError("types and bias have arms", "--arms", "leave it out")
    study.check_seeds(SEEDS.value)
    check_directory(OUT.value, "--out")
    check_directory(RUNS.value, "--runs")
    measures.check_weights(("kid",), {}, "efflite0")  # before hours of training
    out, settings = Path(OUT.value), {"base": identity(place()), "number": NUMBER.value}
    settings |= {"seeds": SEEDS.value, "steps": TRAIN.value, "num_real": REAL.value}
    recipes = [arms.config_of(arm, 0).to_json() for arm in arms.ARMS]
    settings |= {"runs": RUNS.value, "recipes": study.digest(recipes)}
    for name in STUDY.value:
        own = {"arms": chosen(name)} if name in COMPARED else {}
        study.make(out, name, settings | own, FUNCTIONS[name], REDO.value)
    print(study.write(out, "ControlNet-XS on the embedded world", TITLES))
    return 0


if __name__ == "__main__":
    errors.run_app(main)

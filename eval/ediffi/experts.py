"""(a) Experts against one shared model, at equal training samples and equal cost of sampling.

Every arm starts from the same shared model of its seed (but `deeper`, which also costs more to
sample) and sees as many pictures after it:

  two        two experts, each on its own noise levels (`configs/ediffi.py:tiny`)
  three      three experts (`:three`)
  no_margin  the same, each trained on its own levels alone (`:no_margin`)
  halves     two on half of the levels each, uniform intervals (`:halves`)
  quarters   four on a quarter each (`:quarters`)
  shared     one model on all levels (`:shared`)
  deeper     one of twice as many blocks a level, from a shared model of its own (`:deeper`)
  mixed      one model on the levels that the two experts' shares amount to (`:mixed`)
  mixed_three  the same of the three's (`:mixed_three`)
  updates    one model in smaller batches, so that it is updated more often (`:updates`)

A run of an arm ends with the held-out loss of every noise interval, on the same pictures and noises
in all arms; here they are put side by side, and each arm draws with the same larger stages.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np

import cnxs_jax
from cnxs_jax.data import emoji_scenes
from cnxs_jax.errors import ConfigError
from configs import ediffi as recipe
from eval import ask, measures, plan
from eval import study as study_page
from eval.metrics import features, kid, scene_accuracy
from train import loop

SAME_NAME = (
    "three",
    "no_margin",
    "halves",
    "quarters",
    "shared",
    "deeper",
    "mixed",
    "mixed_three",
    "updates",
)
ARMS = {"two": "tiny"} | {name: name for name in SAME_NAME}
BASELINE = "shared"
WANTED = ("objects", "style", "background", "relation", "all_correct")
SEED_STEP = 100  # between the seeds of two runs; the stages of one use the numbers between


def config_of(arm, seed, clip_path=None, steps=None):
    """The recipe of an arm with everything that is drawn from another seed.

    A stage keeps its distance to its parent's seed. Held-out pictures are those of `data.seed`, the
    same in every arm. `steps`: of each stage, if not the recipe's.
    """
    config = recipe.get_config(ARMS[arm])
    for name in config.stages:
        stage = config[name]
        stage.seed += SEED_STEP * seed
        stage.steps = steps or stage.steps
        stage.optimizer.warmup_steps = min(stage.optimizer.warmup_steps, stage.steps)
        if clip_path:
            stage.clip_path = clip_path
    return config


def train(runs, arms, seeds, clip_path=None, steps=None):
    """Trains what is missing; a directory ARM_SEED each. Arms of a seed share a parent."""
    for seed in seeds:
        for arm in arms:
            share_parent(runs, arm, seed)
            root = Path(runs) / f"{arm}_{seed}"
            loop.main(config_of(arm, seed, clip_path, steps), root, resume=True)


def share_parent(runs, arm, seed):
    """Copies the finished shared stage of another arm of the seed, if this one's is the same."""
    root = Path(runs) / f"{arm}_{seed}"
    if (root / "shared").exists():
        return
    own = config_of(arm, seed).shared
    for other in ARMS:
        found = Path(runs) / f"{other}_{seed}" / "shared"
        if (found / "export").is_dir() and config_of(other, seed).shared == own:
            part = root / "shared.tmp"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(found, part)
            part.replace(root / "shared")
            return


def losses(root):
    """The bins of a finished run's report: [{"quantiles", "expert", "result", ...}]."""
    path = Path(root) / "report.json"
    if not path.is_file():
        raise ConfigError("no finished run there", str(root), "train it: --study=experts")
    return json.loads(path.read_text())["losses"]["base"]["bins"]


def compare(runs, arms, seeds):
    """The ratios to the shared model's loss, as two lists of rows.

    The first has a row a bin of the reports and one of all levels, the second one for each expert
    that owns several bins.
    """
    every = {(a, s): losses(Path(runs) / f"{a}_{s}") for a in arms for s in seeds}
    bins = [tuple(one["quantiles"]) for one in every[BASELINE, seeds[0]]]
    edges = (edge for arm in arms for edge in owned(every[arm, seeds[0]]))
    larger = [edge for edge in dict.fromkeys(edges) if edge not in bins and edge != (0, 1)]
    total = line(every, arms, seeds, 0, 1) | {"quantiles": "all"}
    rows = [line(every, arms, seeds, *edge) for edge in bins]
    return [*rows, total], [line(every, arms, seeds, *edge) for edge in larger]


def owned(bins):
    """(low, high) of each expert's levels."""
    for name in dict.fromkeys(one["expert"] for one in bins):
        edges = [q for one in bins if one["expert"] == name for q in one["quantiles"]]
        yield min(edges), max(edges)


def line(every, arms, seeds, low, high):
    """The row of the levels between two edges of bins."""
    row = {"quantiles": f"{low:.4g} to {high:.4g}"}
    for arm in arms:
        own, shared = ([within(every[a, s], low, high) for s in seeds] for a in (arm, BASELINE))
        row |= spread(arm, own, shared)
        if arm != BASELINE:
            row[f"{arm}, expert"] = experts_of(every[arm, seeds[0]], low, high)
    return row


def within(bins, low, high):
    """The loss of the levels between two edges of bins, weighted by their mass."""
    own = [b for b in bins if low <= b["quantiles"][0] and b["quantiles"][1] <= high]
    mass = [b["quantiles"][1] - b["quantiles"][0] for b in own]
    return float(np.average([b["result"] for b in own], weights=mass))


def experts_of(bins, low, high):
    """Names of the experts that own a part of these levels."""
    own = [b["expert"] for b in bins if b["quantiles"][0] < high and low < b["quantiles"][1]]
    return ", ".join(dict.fromkeys(own))


def spread(arm, own, shared):
    """Mean and every seed's ratio of two lists of losses; of the baseline the losses themselves."""
    if arm == BASELINE:
        return {f"{arm}, loss of each seed": ", ".join(f"{loss:.5f}" for loss in own)}
    ratios = [a / b for a, b in zip(own, shared, strict=True)]
    return {arm: float(np.mean(ratios)), f"{arm}, each seed": ", ".join(f"{r:.3f}" for r in ratios)}


def pictures(runs, arms, seeds, cascade, number, guidance=()):
    """Rows: scene accuracy and KID of every arm's base with the larger stages of `cascade`.

    `guidance`: scales of the base to draw all of it with; none: its own.
    """
    world, read = emoji_scenes.world(), scene_accuracy.load_checker()
    asked = plan.prompts(world, "test", number)
    real, extract = plan.prompts(world, "test", 2 * number, seed=1).images, features.extractor()
    real = extract(real)
    rows = []
    for arm in arms:
        for seed in seeds:
            own = cnxs_jax.load_pipeline(Path(runs) / f"{arm}_{seed}" / "export")
            check_encoders(own, cascade)
            pipe = dataclasses.replace(own, stages=(own.stages[0], *cascade.stages[1:]))
            for scale in guidance or (None,):
                images = ask.draw(pipe, asked.captions, guidance_scale=scale)
                figures, _ = scene_accuracy.score(read, images, asked.facts)
                rows.append({"arm": arm, "seed": seed}
                            | ({"guidance": scale} if guidance else {})
                            | {k: figures[k] for k in WANTED if k in figures}
                            | {"KID": kid.kid(extract(images), real).as_dict()})  # fmt: skip
    return rows


def check_encoders(own, cascade):
    """Raises ConfigError unless the larger stages read the conditions that they were trained on."""
    first, second = (jax.tree.leaves(p.encoder_params) for p in (own, cascade))
    if len(first) != len(second) or not all(map(np.array_equal, first, second)):
        raise ConfigError(
            "the arms and the cascade have different encoders",
            "--cascade",
            "train both on one T5 and one CLIP, or leave --cascade out to compare losses alone",
        )


def study(runs, arms, seeds, cascade, number, guidance=(), clip_path=None, steps=None):
    """Trains, compares and draws."""
    if BASELINE not in arms:
        raise ConfigError(f"nothing to compare with: {arms}", "--arms", f"add {BASELINE}")
    if cascade is not None:
        measures.check_weights(("kid",), {}, "efflite0")  # before hours of training
    train(runs, arms, seeds, clip_path, steps)
    rows, intervals = compare(runs, arms, seeds)
    drawn = pictures(runs, arms, seeds, cascade, number, guidance) if cascade is not None else []
    return {"rows": rows, "intervals": intervals, "drawn": drawn}, ratios(rows)


def ratios(rows):
    """The loss of each arm over the shared model's in every noise interval, as a plot."""
    figure, panel = study_page.plots().subplots(figsize=(7, 4), layout="constrained")
    own = [row for row in rows if row["quantiles"] != "all"]
    places = np.arange(len(own))
    for arm in [k for k in own[0] if k in ARMS]:
        panel.plot(places, [row[arm] for row in own], marker="o", label=arm)
    panel.axhline(1.0, color="grey", linewidth=1, label="shared")
    panel.set_xticks(places, [row["quantiles"].replace(" to ", "\n") for row in own], fontsize=8)
    panel.set_xlabel("quantiles of the training noise, low noise left")
    panel.set_ylabel("held-out loss over the shared model's")
    panel.legend(frameon=False)
    return figure

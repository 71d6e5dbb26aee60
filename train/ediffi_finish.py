"""What joins the stages of an eDiff-I run: the cascade, and the loss in every noise interval.

`cascade` is a config's `finish`. It writes `export/` (see `pipelines.ediffi`), `report.json`,
`report.md` and `pictures.png` into the run's directory.
"""

import dataclasses
from itertools import pairwise, product

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.diffusion import expert_tree, sampling
from cnxs_jax.diffusion.expert_tree import Interval, LogNormal
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines.base import Component
from cnxs_jax.pipelines.ediffi import EDiffIPipeline
from cnxs_jax.pipelines.load import load_model
from cnxs_jax.pipelines.pipeline import save_pipeline
from cnxs_jax.storage import write_json, write_text
from cnxs_jax.tree import flatten
from train import inputs, report, validate
from train.objectives_edm import edm_denoise
from train.parts import from_signed, tiles
from train.tasks_ediffi import encoder, open_encoders, stage_of


def quantiles(value, where):
    """Rising numbers in (0, 1)."""
    validate.numbers(len(value) if validate.sequence(value) else 0)(value, where)
    for number in value:
        validate.number(0, 1, open_low=True, open_high=True)(number, where)


KEYS = {
    "cascade": {
        "num_heldout": validate.integer(1),
        "noises": validate.integer(1),
        "quantiles": quantiles,
        "num_pictures": validate.integer(1),
    }
}
BATCH = 64
STAGE = "train.tasks_ediffi:stage"


def check_plan(values, where):
    """Raises ConfigError unless the stages make one pipeline.

    All read one T5 and one CLIP. Those that train experts train each of their tree once, of the
    same noise levels and for the same sampler.
    """
    own = [(n, values[n]) for n in values["stages"] if values[n]["task"] == STAGE]
    check_agreement(own, ("text_path", "clip_path"), where, "all stages")
    trees = {}
    for name, one in own:
        if one.get("tree") and one.get("mix") is None:
            trees.setdefault(one["size"], []).append((name, one))
    for size, found in trees.items():
        intervals = expert_tree.cover(found[0][1]["tree"])
        numbers = [one.get("expert") for _, one in found]
        complete = sorted(n for n in numbers if n is not None) == list(range(len(intervals)))
        same = all(expert_tree.cover(one["tree"]) == intervals for _, one in found)
        if not same or (numbers != [None] and not complete):
            names = ", ".join(interval.name for interval in intervals)
            raise ConfigError(
                f"the stages {', '.join(n for n, _ in found)} train the experts {numbers}",
                f"{where}.stages",
                f"at {size} px there must be one of each: {names}",
            )
        check_agreement(found, ("levels", "sampler"), where, f"all experts at {size} px")


def check_agreement(stages, keys, where, who):
    """Raises ConfigError unless `stages`, [(name, values)], agree on `keys`."""
    for ((first, given), (name, values)), key in product(pairwise(stages), keys):
        one, other = (flatten({key: v.get(key)}) for v in (given, values))
        for part in {**one, **other}:
            if one.get(part) != other.get(part):
                raise ConfigError(
                    f"{part} is {one.get(part)!r} in {first} and {other.get(part)!r} in {name}",
                    f"{where}.{name}.{part.replace('/', '.')}",
                    f"give {who} the same: they become one pipeline",
                )


CONFLICTS = {"cascade": check_plan}


def cascade(config, root):
    """Joins the exports of `config.stages` that lie below `root`."""
    found = resolutions(config, root)
    first = config[found[0]["stages"][0]]
    encoders, params, batches = open_encoders(first)
    stages = tuple(entry["result"] for entry in found)
    pipe = EDiffIPipeline(stages, encoders, params, batches.tokenizers, batches.lengths)
    save_pipeline(pipe, root / "export")
    figures = {
        "training": {n: report.costs(config[n], root / n) for n in config.stages},
        "losses": {e["result"].name: compared(config, e) for e in found if len(e["stages"]) > 1},
    }
    captions = inputs.examples(first, config.finish.num_pictures)["caption"]
    drawn = pipe(captions, seed=0, output_type="latent").images
    save_picture(tiles(from_signed(drawn)), root / "pictures.png")
    write_json(root / "report.json", figures, sort_keys=False)
    write_text(root / "report.md", in_words(figures))


def resolutions(config, root):
    """One entry a picture size, smallest first: its stages, the parent's Stage and the result's.

    The parent is the first stage of that size. The result is made of the stages that train
    experts, if there are any, else it is the last stage.
    """

    def components(name, count=1):
        place = root / name / "export"
        return [Component(*load_model(place / f"expert_{i}")) for i in range(count)]

    sizes, found = {}, []
    for name in config.stages:
        if config[name].task == STAGE:
            sizes.setdefault(config[name].size, []).append(name)
    for size, names in sorted(sizes.items()):
        label = f"sr{size}" if config[names[0]].get("low_res_size") else "base"
        one = config[names[-1]]
        parent = stage_of(config[names[0]], components(names[0]), name=label)
        experts, intervals = components(names[-1]), (expert_tree.WHOLE,)
        if one.get("tree") and one.get("mix") is None:
            intervals = expert_tree.cover(one.tree)
            parts = sorted((n for n in names if config[n].get("tree")), key=number_of(config))
            several = one.get("expert") is None
            experts = [c for n in parts for c in components(n, len(intervals) if several else 1)]
        result = stage_of(one, experts, intervals, label)
        found.append({"stages": names, "parent": parent, "result": result})
    return found


def number_of(config):
    """The sort key of stages that train one expert each."""
    return lambda name: config[name].get("expert") or 0


def compared(config, entry):
    """Held-out losses of parent and result in every noise interval, with equal noises."""
    parent, result = entry["parent"], entry["result"]
    cuts = bins(result.intervals, config.finish.quantiles)
    one = config[entry["stages"][0]]
    batches = heldout(one, config.finish.num_heldout)
    parent = dataclasses.replace(parent, levels=result.levels)  # they may be trained on others
    losses = {
        "parent": interval_losses(parent, cuts, batches, config.finish.noises),
        "result": interval_losses(result, cuts, batches, config.finish.noises),
    }
    levels, mass = result.levels, np.array([cut.mass for cut in cuts])
    rows = [
        {
            "quantiles": [cut.low, cut.high],
            "sigma": [level(levels.edge(cut.low)), level(levels.edge(cut.high))],
            "expert": result.intervals[owner(result.intervals, cut)].name,
            "parent": float(losses["parent"][i]),
            "result": float(losses["result"][i]),
            "ratio": float(losses["result"][i] / losses["parent"][i]),
        }
        for i, cut in enumerate(cuts)
    ]
    total = {name: float((mass * value).sum()) for name, value in losses.items()}
    return {"bins": rows, "total": {**total, "ratio": total["result"] / total["parent"]}}


def level(sigma):
    """A noise level as JSON can hold it; None is infinity."""
    return float(sigma) if np.isfinite(sigma) else None


def bins(intervals, quantiles):
    """Intervals between all edges: those of the experts and the given ones."""
    edges = {0.0, 1.0, *map(float, quantiles), *(i.low for i in intervals)}
    edges = sorted(edges)
    return [Interval(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def owner(intervals, cut):
    """Index of the expert that owns `cut`, which lies within one."""
    return next(i for i, one in enumerate(intervals) if one.low <= cut.low < one.high)


def heldout(config, number):
    """Encoded batches of `number` pictures that training does not show, whole, without style."""
    encoders, params, loader = open_encoders(config)
    whole = type(config)(config.to_dict() | {"crop": None})
    encode = jax.jit(encoder(whole, encoders))
    examples = inputs.examples(config, number)
    found = []
    for start in range(0, number, BATCH):
        part = {name: value[start : start + BATCH] for name, value in examples.items()}
        batch = encode(params, loader.of(part), jax.random.key(0))
        if "clip_image_mask" in batch["cond"]:  # texts alone: a picture would tell its own content
            batch["cond"]["clip_image_mask"] *= 0
        found.append(batch)
    return found


def interval_losses(stage, cuts, batches, noises=1):
    """Weighted denoising loss of a `Stage` in every interval, [cuts].

    Noise levels and noises depend on the interval and the batch alone: two models see the same.
    """
    losses = np.zeros((len(cuts), len(batches)))
    modules = {expert.module for expert in stage.experts}
    programs = {module: loss_program(module, stage.levels, noises) for module in modules}
    for i, cut in enumerate(cuts):
        expert = stage.experts[owner(stage.intervals, cut)]
        limits = jnp.array([cut.low, cut.high], jnp.float32)
        for k, batch in enumerate(batches):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), k)
            losses[i, k] = programs[expert.module](expert.params, batch, limits, key)
    return losses.mean(axis=1)


def loss_program(module, levels: LogNormal, noises):
    """`(params, batch, (low, high), key) -> loss`, compiled once for all intervals."""
    objective = edm_denoise(sampling.denoiser(module), levels, interval=None, noises=noises)

    @jax.jit
    def loss(params, batch, limits, key):
        return objective(params, {}, {"interval": limits}, batch, key)[0]

    return loss


def save_picture(picture, path):
    from PIL import Image

    Image.fromarray(picture).save(path)


def in_words(figures):
    """The figures as Markdown."""
    lines = ["# eDiff-I: what the stages made", "", "![pictures](pictures.png)", ""]
    for name, found in figures["losses"].items():
        lines += [f"## Held-out denoising loss, {name}", ""]
        lines += ["| quantiles | sigma | expert | parent | result | ratio |", "|" + "---|" * 6]
        for row in found["bins"]:
            low, high = row["quantiles"]
            below, above = row["sigma"]
            noise = f"{below:.3g} and more" if above is None else f"{below:.3g} to {above:.3g}"
            values = f"{row['parent']:.4f} | {row['result']:.4f} | {row['ratio']:.3f}"
            lines.append(f"| {low:.4g} to {high:.4g} | {noise} | {row['expert']} | {values} |")
        total = found["total"]
        values = f"{total['parent']:.4f} | {total['result']:.4f} | {total['ratio']:.3f}"
        lines += [f"| all | | | {values} |", ""]
    lines += ["## Training", "", "| stage | steps | images | minutes |", "|---|---|---|---|"]
    for name, cost in figures["training"].items():
        lines.append(
            f"| {name} | {cost['training steps']} | {cost['training images']} "
            f"| {cost['training minutes']} |"
        )
    return "\n".join(lines) + "\n"

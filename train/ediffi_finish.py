"""What joins the stages of an eDiff-I run: the cascade, and the loss in every noise interval.

`cascade` is a config's `finish`. It writes `export/` (see `pipelines.ediffi`), `report.json`,
`report.md` and `pictures.png` into the run's directory.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.diffusion import expert_tree, sampling
from cnxs_jax.diffusion.expert_tree import Interval, LogNormal
from train import inputs, report, validate
from train.objectives_edm import edm_denoise
from train.pictures import grid, to_uint8
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


def cascade(config, root):
    """Joins the exports of `config.stages` that lie below `root`."""
    from cnxs_jax.pipelines.ediffi import EDiffIPipeline
    from cnxs_jax.pipelines.pipeline import save_pipeline

    found = resolutions(config, root)
    first = config[found[0]["stages"][0]]
    encoders, params, batches = open_encoders(first)
    tokens = {("clip_text" if k else "text"): v for k, v in batches.tokenizers.items()}
    limits = dict.fromkeys(tokens, first.data.get("max_length", 24))
    stages = tuple(entry["ensemble"] for entry in found)
    pipe = EDiffIPipeline(stages, encoders, params, tokens, limits)
    save_pipeline(pipe, root / "export")
    figures = {
        "training": {n: report.costs(config[n], root / n) for n in config.stages},
        "losses": {
            entry["ensemble"].name: compared(config, entry)
            for entry in found
            if entry["shared"] is not None and entry["ensemble"] is not entry["shared"]
        },
    }
    captions = inputs.examples(first, config.finish.num_pictures)["caption"]
    drawn = pipe(captions, seed=0, output_type="latent").images
    save_picture(grid(to_uint8(drawn), 8), root / "pictures.png")
    (root / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    (root / "report.md").write_text(in_words(figures))


def resolutions(config, root):
    """One entry a picture size, smallest first: its stages, shared model and ensemble.

    The ensemble is made of the stages that have a `tree`; without one it is the shared model.
    """
    from cnxs_jax.pipelines.base import Component
    from cnxs_jax.pipelines.load import load_model

    def components(name, count):
        return [
            Component(*load_model(root / name / "export" / f"expert_{i}")) for i in range(count)
        ]

    sizes = {}
    names = [n for n in config.stages if config[n].task == "train.tasks_ediffi:stage"]
    for name in names:
        sizes.setdefault(config[name].size, []).append(name)
    found = []
    for size in sorted(sizes):
        whole = [n for n in sizes[size] if not config[n].get("tree")]
        parts = [n for n in sizes[size] if config[n].get("tree")]
        label = "base" if not config[sizes[size][0]].get("low_res_size") else f"sr{size}"
        shared = stage_of(config[whole[0]], components(whole[0], 1), name=label) if whole else None
        ensemble = shared
        if parts:
            one = config[parts[0]]
            intervals = expert_tree.cover(one.tree)
            if one.get("expert") is None:
                experts = components(parts[0], len(intervals))
            else:
                ordered = sorted(parts, key=lambda n: config[n].expert)
                experts = [components(n, 1)[0] for n in ordered]
            ensemble = stage_of(one, experts, intervals, label)
        found.append({"stages": sizes[size], "shared": shared, "ensemble": ensemble})
    return found


def compared(config, entry):
    """Held-out losses of shared model and ensemble in every noise interval, with equal noises."""
    shared, ensemble = entry["shared"], entry["ensemble"]
    cuts = bins(ensemble.intervals, config.finish.quantiles)
    one = config[entry["stages"][0]]
    batches = heldout(one, config.finish.num_heldout)
    losses = {
        "shared": interval_losses(shared, cuts, batches, config.finish.noises),
        "ensemble": interval_losses(ensemble, cuts, batches, config.finish.noises),
    }
    levels, mass = ensemble.levels, np.array([cut.mass for cut in cuts])
    rows = [
        {
            "quantiles": [cut.low, cut.high],
            "sigma": [float(levels.edge(cut.low)), float(levels.edge(cut.high))],
            "expert": ensemble.intervals[owner(ensemble.intervals, cut)].name,
            "shared": float(losses["shared"][i]),
            "ensemble": float(losses["ensemble"][i]),
            "ratio": float(losses["ensemble"][i] / losses["shared"][i]),
        }
        for i, cut in enumerate(cuts)
    ]
    total = {name: float((mass * value).sum()) for name, value in losses.items()}
    return {"bins": rows, "total": {**total, "ratio": total["ensemble"] / total["shared"]}}


def bins(intervals, quantiles):
    """Intervals between all edges: those of the experts and the given ones."""
    edges = {0.0, 1.0, *map(float, quantiles), *(i.low for i in intervals)}
    edges = sorted(edges)
    return [Interval(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def owner(intervals, cut):
    """Index of the expert that owns `cut`, which lies within one."""
    return next(i for i, one in enumerate(intervals) if one.low <= cut.low < one.high)


def heldout(config, number):
    """Encoded batches of `number` pictures that training does not show, never cropped."""
    encoders, params, loader = open_encoders(config)
    whole = type(config)(config.to_dict() | {"crop": None})
    encode = jax.jit(encoder(whole, encoders))
    examples = inputs.examples(config, number)
    found = []
    for start in range(0, number, BATCH):
        part = {name: value[start : start + BATCH] for name, value in examples.items()}
        found.append(encode(params, loader.of(part), jax.random.key(0)))
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
    lines = ["# eDiff-I: experts against the shared model", "", "![pictures](pictures.png)", ""]
    for name, found in figures["losses"].items():
        lines += [f"## Held-out denoising loss, {name}", ""]
        lines += ["| quantiles | sigma | expert | shared | ensemble | ratio |", "|" + "---|" * 6]
        for row in found["bins"]:
            low, high = row["quantiles"]
            noise = f"{row['sigma'][0]:.3g} to {row['sigma'][1]:.3g}"
            values = f"{row['shared']:.4f} | {row['ensemble']:.4f} | {row['ratio']:.3f}"
            lines.append(f"| {low:.4g} to {high:.4g} | {noise} | {row['expert']} | {values} |")
        total = found["total"]
        values = f"{total['shared']:.4f} | {total['ensemble']:.4f} | {total['ratio']:.3f}"
        lines += [f"| all | | | {values} |", ""]
    lines += ["## Training", "", "| stage | steps | images | minutes |", "|---|---|---|---|"]
    for name, cost in figures["training"].items():
        lines.append(
            f"| {name} | {cost['training steps']} | {cost['training images']} "
            f"| {cost['training minutes']} |"
        )
    return "\n".join(lines) + "\n"

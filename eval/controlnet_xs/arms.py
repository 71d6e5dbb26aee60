"""Which controller, at which size? The same base, pictures, noises and steps for every arm.

`costs` times the train steps of all arms by turns in one process; memory is what XLA plans for the
step on this machine's backend.
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np

from cnxs_jax import precision, sharding
from cnxs_jax.errors import ConfigError
from cnxs_jax.storage import fill, write_json
from configs import controlnet_xs as recipe
from eval import controlled
from eval.draw import identity
from train import loop, validate

SIZES = {"half": (12, 12, 16), "double": (48, 48, 64), "quadruple": (96, 96, 128)}
ARMS = {
    "A": {"control_type": "A"},
    "B": {},
    "C": {"control_type": "C"},
    "ControlNet": {"kind": "controlnet"},
    **{f"B {name}": {"block_out_channels": widths} for name, widths in SIZES.items()},
}
METRICS = ("control_edges", "control_masks", "control_depth", "scene_accuracy", "kid")
COLUMNS = {
    "control_edge_f1@1px": "edge F1",
    "control_mask_iou": "mask IoU",
    "control_depth_order": "depth order",
    "kid_efflite0": "KID",
    "objects": "objects",
    "style": "style",
    "all_correct": "all correct",
}
STEPS, GUIDANCE = 20, 3.0
HINT = recipe.get_config("tiny").data.hint


def config_of(arm, seed, base_path=None):
    """The recipe of an arm; the seed decides the fresh parameters, the pictures and the noises."""
    config = recipe.get_config("tiny")
    config.control.update(ARMS[arm])
    config.seed = config.data.seed = seed
    config.report = None
    if base_path:
        config.base_path = str(base_path)
    return config


def directory(runs, arm, seed):
    """The run's directory."""
    return Path(runs) / f"{arm.replace(' ', '_')}_{seed}"


def train(runs, arms, seeds, base_path=None, steps=None):
    """Trains what is missing.

    Raises:
        ConfigError: a run on a base of that name which was another one then.
    """
    for seed in seeds:
        for arm in arms:
            config, root = config_of(arm, seed, base_path), directory(runs, arm, seed)
            config.steps = steps or config.steps
            warmup = min(config.optimizer.warmup_steps, config.steps)
            config.optimizer.warmup_steps = warmup
            check_base(fill(config.base_path, root), root)
            loop.main(config, root, resume=True)


def check_base(base, root):
    """Notes which base the run in `root` has; a run goes on and is read on no other."""
    path, own = root / "base.json", {"digest": identity(base)}
    if path.is_file() and json.loads(path.read_text()) != own:
        what = f"the run was trained on another base than what {base} is now"
        raise ConfigError(what, str(root), "choose another --runs")
    root.mkdir(parents=True, exist_ok=True)
    write_json(path, own)


def evaluated(runs, arm, seed, base_path, number, real):
    """Figures of the base alone, of the arm, and of real scenes through the VAE."""
    root = directory(runs, arm, seed)
    config = config_of(arm, seed, base_path)
    page = controlled.main(
        loop.expand(config, root), root, num_prompts=number, num_real=real, steps=STEPS,
        guidance_scale=GUIDANCE, metrics=METRICS, redraw=True,
    )  # fmt: skip
    rows = json.loads(Path(page).with_suffix(".json").read_text())["rows"]
    return {row["method"]: row for row in rows}


def study(runs, arms, seeds, base_path, number, real=1000, repeats=9, steps=None):
    """Trains, draws and times; rows: no control, the arms with each seed's figures, the ceiling."""
    train(runs, arms, seeds, base_path, steps)
    found = {(a, s): evaluated(runs, a, s, base_path, number, real) for a in arms for s in seeds}
    any_one = found[arms[0], seeds[0]]
    rows = [{"controller": "none"} | picked(any_one["base without control"])]
    for arm in arms:
        own = [found[arm, seed]["controller"] for seed in seeds]
        rows.append({"controller": arm} | over_seeds(own))
    rows.append(
        {"controller": "real scenes through the VAE"}
        | picked(any_one["real scenes through the VAE"])
    )
    return {"rows": rows, "costs": costs(arms, base_path, repeats)}, curves(runs, arms, seeds)


def picked(row):
    """The columns of `COLUMNS` that a row of the report has."""
    return {name: row[key] for key, name in COLUMNS.items() if key in row}


def over_seeds(rows):
    """Means of each column with every seed's value."""
    made = {}
    for key, name in COLUMNS.items():
        values = [row[key]["value"] for row in rows if key in row]
        if values:
            made[name] = float(np.mean(values))
            made[f"{name}, each seed"] = ", ".join(f"{v:.3f}" for v in values)
    return made


def curves(runs, arms, seeds):
    """Training loss of every arm, the mean of the seeds, as a plot."""
    from eval import study as pages

    figure, panel = pages.plots().subplots(figsize=(7, 4), layout="constrained")
    for arm in arms:
        logged = [
            [json.loads(line) for line in (directory(runs, arm, s) / "metrics.jsonl").open()]
            for s in seeds
        ]
        length = min(map(len, logged))
        losses = np.mean([[line["loss"] for line in own[:length]] for own in logged], axis=0)
        panel.plot([line["step"] for line in logged[0][:length]], losses, label=arm)
    panel.set_xlabel("training steps")
    panel.set_ylabel("training loss, mean of the seeds")
    panel.legend(frameon=False)
    return figure


# --- what a train step costs ------------------------------------------------------------------


@dataclasses.dataclass
class Timed:
    """One arm's compiled train step, its inputs, and what it took."""

    fit: object
    batch: object
    step: object
    seconds: list = dataclasses.field(default_factory=list)

    def run(self):
        """One step; its seconds count from the second one on."""
        start = time.perf_counter()
        self.fit.state, metrics = self.step(
            self.fit.state, self.fit.frozen, self.batch, self.fit.key_step
        )
        jax.block_until_ready(metrics)
        self.seconds.append(time.perf_counter() - start)


def costs(arms, base_path=None, repeats=9):
    """Rows: trained parameters, seconds of a train step (medians, by turns), planned memory."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    timed, rows = {}, []
    with jax.set_mesh(mesh):
        for arm in arms:
            config = config_of(arm, 0, base_path)
            validate.check(config)
            root = Path("unused")
            with precision.matmul(config.matmul_precision):
                fit = loop.Fit(config, loop.build_task(loop.expand(config, root)), mesh, root)
                fit.state, batch = fit.fresh(), fit.batch(0)
                lowered = fit.step.lower(fit.state, fit.frozen, batch, fit.key_step)
                timed[arm] = Timed(fit, batch, lowered.compile())
        for one in list(timed.values()) * (repeats + 1):
            one.run()
        for arm, one in timed.items():
            memory = one.step.memory_analysis()
            rows.append({
                "controller": arm,
                "trained parameters": one.fit.parameters()["trained"],
                "step s": float(np.median(one.seconds[1:])),
                "temp memory MiB": memory.temp_size_in_bytes / 2**20,
                "state and inputs MiB": memory.argument_size_in_bytes / 2**20,
            })  # fmt: skip
    return relative(rows, timed)


def relative(rows, timed):
    """Rows with the step time over ControlNet's: the median of the pairs, and their range."""
    if "ControlNet" not in timed:
        return rows
    base = np.array(timed["ControlNet"].seconds[1:])
    for row in rows:
        ratios = np.array(timed[row["controller"]].seconds[1:]) / base
        row["step / ControlNet's"] = float(np.median(ratios))
        row["least and most"] = f"{ratios.min():.2f} to {ratios.max():.2f}"
    return rows

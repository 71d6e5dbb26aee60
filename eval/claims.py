"""What the papers' headline claims come to in FLOPs: counted programs, nothing is timed.

Each program is lowered at its published size without weights, as for an accelerator (on a CPU some
convolutions have a form with fewer products), and walked (`eval.flops`); the closed form stands
beside it. Memory and seconds are other questions: `eval.benchmark` measures them.

  python -m eval.claims                       # minutes, 2 GB
  python -m eval.claims --only=control --out=runs/claims
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging

from cnxs_jax import backend, errors
from cnxs_jax.diffusion import guidance, sampling, schedule, solvers
from cnxs_jax.storage import check_directory, write_json, write_text
from eval import closed_forms, flops
from eval.benchmark_case import normal
from eval.benchmark_control import ControlNetUNet, ControlNetXSUNet
from eval.benchmark_networks import PixArt, UNet
from eval.benchmark_steps import ControlNetStep, ControlNetXSStep


def control(size):
    """Rows: what control costs, of an evaluation and of a train step, in parts of the base's."""
    rows = []
    for name, cls, program in (
        ("UNet alone: one evaluation", UNet, "one evaluation"),
        ("ControlNet-XS: one evaluation", ControlNetXSUNet, "one evaluation"),
        ("ControlNet: one evaluation", ControlNetUNet, "one evaluation"),
        ("ControlNet-XS: train step", ControlNetXSStep, ControlNetXSStep.name),
        ("ControlNet: train step", ControlNetStep, ControlNetStep.name),
    ):
        case = cls(size, steps=1)
        lowered = case.lower(only=program)[program]
        rows.append((name, flops.count(lowered), case.functions()[program][1]))
    return compared(rows)


def compared(rows):
    """(program, FLOPs, closed form) as lines of a table, in parts of the first one."""
    return [
        {
            "program": name,
            "GFLOP": found / 1e9,
            "GFLOP closed form": closed / 1e9,
            "to the first": found / rows[0][1],
        }
        for name, found, closed in rows
    ]


def few_steps(size):
    """Rows: PixArt's student at 4 steps, its teacher at 14 and 25 guided steps."""
    rows = []
    for name, steps, guided in (
        ("LCM, 4 steps", 4, False), ("DPM-Solver++, 14 guided steps", 14, True),
        ("DPM-Solver++, 25 guided steps", 25, True),
    ):  # fmt: skip
        rows.append((name, *sampled(PixArt(size), [steps], guided)))
    return compared(rows)


def experts(size):
    """Rows: the same loop with one denoiser, and with several of its size by turns."""
    rows = []
    for name, shares in (
        ("one denoiser, 24 steps", [24]),
        ("three experts, 8 steps each", [8] * 3),
    ):
        rows.append((name, *sampled(PixArt(size), shares, False)))
    return compared(rows)


def sampled(case, shares, guided):
    """(FLOPs counted, closed form) of a sampling loop of `PixArt`; solvers differ in none.

    Args:
        shares: steps of each expert.
        guided: two evaluations a step.
    """
    steps, number = sum(shares), len(shares)
    owners = tuple(n for n, share in enumerate(shares) for _ in range(share))
    table = dataclasses.replace(solvers.dpmpp(schedule.linear(), steps), expert=owners)
    table = jax.tree.map(lambda c: np.asarray(c, np.float32), table)
    x, cond = case.inputs()
    if guided:
        null = {"text": normal(*cond["text"].shape, seed=1), "text_mask": cond["text_mask"]}
        cond = cond | {"null": null, "guidance_scale": np.full(1, 4.5, np.float32)}
    denoise = sampling.denoiser(case.module)
    denoise = guidance.cfg(denoise) if guided else denoise
    params = case.abstract() if number == 1 else (case.abstract(),) * number
    run = jax.jit(lambda params, x, cond: sampling.sample(denoise, params, x, cond, table))
    tokens, times = case.given["tokens"], 2 if guided else 1
    once, text = (f(case.module, tokens) for f in (closed_forms.pixart, closed_forms.pixart_text))
    closed = times * (steps * (once - text) + number * text)
    return flops.count(run.lower(params, x, cond)), closed


CLAIMS = {"control": control, "few_steps": few_steps, "experts": experts}


def markdown(found):
    """Tables of {claim: rows}."""
    lines = []
    for name, rows in found.items():
        columns = list(rows[0])
        lines += [f"**{name}**", "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + " --- |" * len(columns))
        for row in rows:
            cells = [v if isinstance(v, str) else f"{v:.4g}" for v in row.values()]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    logging.set_verbosity(logging.WARNING)  # JAX says at length which backends are not there
    if OUT.value:
        check_directory(OUT.value, "--out")
    names = [ONLY.value] if ONLY.value else list(CLAIMS)
    with backend.assume(backend.ACCELERATOR):
        found = {name: CLAIMS[name](SIZE.value) for name in names}
    text = markdown(found)
    print(text)
    if OUT.value:
        write_json(Path(OUT.value) / "claims.json", found, sort_keys=False)
        write_text(Path(OUT.value) / "claims.md", text)
    return 0


if __name__ == "__main__":
    SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "The published widths, or seconds.")
    ONLY = flags.DEFINE_enum("only", None, list(CLAIMS), "One claim instead of all.")
    OUT = flags.DEFINE_string("out", None, "Directory of claims.json and claims.md.")
    errors.run_app(main)

"""What an evaluation compares: the rows, each with its network evaluations, and the prompts."""

import dataclasses

import numpy as np

from cnxs_jax.data import scenes
from cnxs_jax.errors import ConfigError, did_you_mean

SCHEDULERS = {"DDIM": "ddim", "DPM-Solver++": "dpmpp"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to make the pictures.

    Attributes:
        method: name of the line in plots.
        model: "teacher" or "student".
        scheduler: the pipeline's scheduler name, None for the model's own.
        guided: a guided step evaluates the network twice.
        steps: of the solver.
    """

    method: str
    model: str
    scheduler: str | None
    guided: bool
    steps: int

    @property
    def evaluations(self):
        """Network evaluations an image."""
        return self.steps * (2 if self.guided else 1)

    @property
    def slug(self):
        """File name of this row's pictures."""
        kind = "guided" if self.guided else "plain"
        return f"{self.model}_{self.scheduler or 'own'}_{kind}_{self.steps}"


def reference_name(solver, steps):
    """The method name of the teacher at many guided steps."""
    return f"teacher {solver}, {steps} guided steps"


def rows(steps=(1, 2, 4, 8), reference_steps=50, student=True, solvers=tuple(SCHEDULERS)):
    """The comparison: the teacher at its best, with the student's budget, and the student.

    For N network evaluations the teacher runs N unguided steps and N / 2 guided ones (N even), with
    each of `solvers`, so that no row is favoured by what it spends.

    Raises:
        ConfigError: steps that are no positive integers.
    """
    if not steps or any(not isinstance(n, int) or n < 1 for n in (*steps, reference_steps)):
        raise ConfigError(f"steps must be positive integers, got {steps}", "--steps", "1,2,4,8")
    steps, chosen = sorted(set(steps)), [(name, SCHEDULERS[name]) for name in solvers]
    out = [
        Row(reference_name(name, reference_steps), "teacher", key, True, reference_steps)
        for name, key in chosen
    ]
    for name, key in chosen:
        out += [
            Row(f"teacher {name}, guided", "teacher", key, True, n // 2)
            for n in steps
            if n % 2 == 0
        ]
        out += [Row(f"teacher {name}, unguided", "teacher", key, False, n) for n in steps]
    if student:
        out += [Row("student", "student", None, False, n) for n in steps]
    return out


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of one split with the scenes that they were written for.

    Attributes:
        split: of the world.
        captions: texts.
        facts: what each caption says (`scene_accuracy.judge`).
        images: uint8 `[N, H, W, 3]`, the scenes themselves: other pictures would be right too.
        heldout: the concept of the held-out (concept, style) pair of each, or None.
    """

    split: str
    captions: list
    facts: list
    images: np.ndarray
    heldout: list


def prompts(world, split, number, seed=0, size=64):
    """The first `number` prompts of a split; see `Prompts`.

    Raises:
        ConfigError: unknown split, or no prompts.
    """
    if split not in scenes.SPLITS:
        hint = did_you_mean(split, scenes.SPLITS)
        raise ConfigError(f"unknown split {split!r}.{hint}", "split", f"one of {scenes.SPLITS}")
    if number < 1:
        raise ConfigError(f"{number} prompts", "--num_prompts", "use at least 1")
    source = scenes.SceneSource(world, split, size, truth=False, seed=seed)
    found = [source[i] for i in range(number)]
    held = world.heldout_pairs()
    return Prompts(
        split,
        [s["caption"] for s in found],
        [s["prompt"] for s in found],
        np.stack([s["image"] for s in found]),
        [
            next((c for c in s["prompt"]["concepts"] if (c, s["style"]) in held), None)
            for s in found
        ],
    )

"""What an evaluation compares: rows (ways to make pictures), prompts, and the reference.

A `Plan` is everything that `run.evaluate` needs to know. The comparison of a student with its
teacher (`rows`), a sweep of one pipeline (`sweep_rows`) and two folders of pictures
(`run.folders`) are three plans.
"""

import dataclasses
import itertools
import math
import re

import numpy as np

from cnxs_jax.control import hints
from cnxs_jax.data import scenes
from cnxs_jax.errors import ConfigError, did_you_mean
from cnxs_jax.pipelines.scheduler import NAMES

SCHEDULERS = {"DDIM": "ddim", "DPM-Solver++": "dpmpp"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to make the pictures.

    Attributes:
        method: name of the line in plots.
        model: which of the pipelines: "teacher", "student" or "pipeline".
        scheduler: the pipeline's scheduler name, None for the model's own.
        guided: a guided step evaluates the network twice.
        steps: of the solver; None for pictures that were not drawn here.
        guidance_scale: of this row alone; None: the evaluation's.
    """

    method: str
    model: str
    scheduler: str | None = None
    guided: bool = False
    steps: int | None = None
    guidance_scale: float | None = None

    @property
    def evaluations(self):
        """Network evaluations an image."""
        return self.steps and self.steps * (2 if self.guided else 1)

    @property
    def slug(self):
        """Directory of this row's pictures."""
        kind = "guided" if self.guided else "plain"
        scale = "" if self.guidance_scale is None else f"_scale{self.guidance_scale:g}"
        return f"{self.model}_{self.scheduler or 'own'}_{kind}_{self.steps}{scale}"


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


def parse_sweep(text):
    """`"guidance_scale=1:8"` -> `("guidance_scale", (1.0, ..., 8.0))`.

    `first:last`, `first:last:step` (both ends count) or a list `a,b,c`.

    Raises:
        ConfigError: an unknown key, or values that it cannot have.
    """
    key, found, values = text.partition("=")
    if key not in SWEEPS or not found:
        fix = "e.g. --sweep guidance_scale=1:8, steps=1,2,4,8 or scheduler=ddim,dpmpp"
        known = f"one of {', '.join(SWEEPS)}.{did_you_mean(key, SWEEPS)}"
        raise ConfigError(f"cannot sweep {key!r}, only {known}", "--sweep", fix)
    try:
        values = tuple(SWEEPS[key](v) for v in _spread(values))
    except ValueError as error:
        raise ConfigError(f"{text!r}: {error}", "--sweep", f"e.g. {EXAMPLES[key]}") from None
    if len(set(values)) < len(values):
        raise ConfigError(f"{text!r} has a value twice", "--sweep")
    return key, values


def _spread(text):
    """The words of `a,b,c`, or the numbers of `first:last[:step]`."""
    if ":" not in text:
        return [word.strip() for word in text.split(",")]
    first, last, step = [float(word) for word in (*text.split(":"), "1")][:3]
    if not (all(map(math.isfinite, (first, last, step))) and step > 0 and last >= first):
        raise ValueError("expected first:last or first:last:step, going up")
    intervals = (last - first) / step + 1e-9
    if not intervals < MOST_VALUES:
        raise ValueError(f"expected at most {MOST_VALUES} values")
    return [f"{first + n * step:.10g}" for n in range(math.floor(intervals) + 1)]


def _scale(word):
    value = float(word)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"a guidance scale is 0 or more, not {word}")
    return value


def count(word):
    """A word as a positive integer; ValueError for others."""
    if not re.fullmatch(r"[1-9][0-9]*", word):
        raise ValueError(f"steps are positive whole numbers, not {word!r}")
    return int(word)


def _scheduler(word):
    if word not in NAMES:
        raise ValueError(f"unknown scheduler {word!r}.{did_you_mean(word, NAMES)}")
    return word


SWEEPS = {"guidance_scale": _scale, "steps": count, "scheduler": _scheduler}
EXAMPLES = {"guidance_scale": "guidance_scale=1:8", "steps": "steps=1,2,4,8",
            "scheduler": "scheduler=ddim,dpmpp"}  # fmt: skip
MOST_VALUES = 1000


def sweep_rows(sweeps, steps, guidance_scale, doubled=True):
    """One row a combination of swept values; the first sweep is the x axis, the others are lines.

    Args:
        sweeps: [(key, values)] of `parse_sweep`; none: one row.
        steps, guidance_scale: where they are not swept.
        doubled: whether guidance takes a second evaluation; not where it is an input.

    Raises:
        ConfigError: a key that is swept twice.
    """
    keys = [key for key, _ in sweeps]
    if len(set(keys)) < len(keys):
        raise ConfigError("a key is swept twice", "--sweep", "join its values: key=a,b,c")
    out = []
    for values in itertools.product(*(values for _, values in sweeps)):
        given = {"steps": steps, "guidance_scale": guidance_scale} | dict(
            zip(keys, values, strict=True)
        )
        lines = [f"{k} {given[k]:g}" if k != "scheduler" else given[k] for k in keys[1:]]
        method = ", ".join(["pipeline", *lines])
        out.append(Row(method, "pipeline", guided=doubled and given["guidance_scale"] > 1, **given))
    return out


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of one split with the pictures that they were written for.

    Attributes:
        split: of the world; "test" for others.
        captions: texts, or None for pictures without.
        facts: what each caption says (`scene_accuracy.judge`), or None.
        images: uint8 `[N, H, W, 3]`, the scenes themselves: other pictures would be right too.
            None where there are none.
        heldout: the concept of the held-out (concept, style) pair of each, or None.
        truth: what a controller is shown and asked for, or None: {"hint": uint8 [N, H, W, 3],
            "foreground": bool [N, H, W], "depth": ranks [N, H, W]}.
    """

    split: str
    captions: list | None
    facts: list | None = None
    images: np.ndarray | None = None
    heldout: list | None = None
    truth: dict | None = None

    def head(self, number):
        """The first `number` of them."""

        def cut(value):
            if isinstance(value, dict):
                return {k: v[:number] for k, v in value.items()}
            return value if value is None or isinstance(value, str) else value[:number]

        return Prompts(*map(cut, vars(self).values()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compared with what.

    Attributes:
        title: of the report.
        rows: `Row`s; pairs are compared with the first one's pictures unless `pairs` is given.
        sets: {"test": Prompts, ...}; every split but "test" gives accuracy columns of its own.
        real: what distributions are compared with: uint8 `[M, H, W, 3]`, `fid.Moments` or None.
        pairs: uint8 `[N, H, W, 3]`, one picture for each test picture, or None.
        maps: whether the pictures are maps (edges, depth, masks) of `pairs`.
        ceilings: {name: function of the test prompts' own pictures}, measured before the rows.
        axis: the column on the x axis of the plots.
        swept: columns that say what was swept.
        references: methods that are horizontal lines there.
        shown: rows of the picture grid.
        notes: sentences below the tables.
    """

    title: str
    rows: tuple
    sets: dict
    real: object = None
    pairs: np.ndarray | None = None
    maps: bool = False
    ceilings: dict = dataclasses.field(default_factory=dict)
    axis: str = "evaluations"
    swept: tuple = ()
    references: tuple = ()
    shown: tuple = ()
    notes: tuple = ()

    @property
    def has(self):
        """What metrics may ask for, of `measures.NEEDS`."""
        test, real = self.sets["test"], self.real
        return {
            "captions": test.captions is not None,
            "facts": test.facts is not None,
            "set": real is not None,
            "real": isinstance(real, np.ndarray),
            "pairs": self.pairs is not None or len(self.rows) > 1,
            "maps": self.maps,
            "truth": test.truth is not None,
        }

    def line(self, row):
        """The first columns of a row's line in the report."""
        swept = {key: getattr(row, key) for key in self.swept if key != "steps"}
        drawn = {"steps": row.steps, "evaluations": row.evaluations}
        return {"method": row.method, **swept, **drawn}


def prompts(world, split, number, seed=0, size=64, hint=None, hint_path=None):
    """The first `number` prompts of a split; see `Prompts`.

    `hint` names a control picture; `hint_path` are the weights of one that has some.

    Raises:
        ConfigError: unknown split, or no prompts.
    """
    if split not in scenes.SPLITS:
        meant = did_you_mean(split, scenes.SPLITS)
        raise ConfigError(f"unknown split {split!r}.{meant}", "split", f"one of {scenes.SPLITS}")
    if number < 1:
        raise ConfigError(f"{number} prompts", "--num_prompts", "use at least 1")
    source = scenes.SceneSource(world, split, size, truth=hint is not None, seed=seed)
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
        _truth(found, hint, hint_path) if hint else None,
    )


def _truth(found, hint, path):
    """`Prompts.truth` of scenes."""
    return {
        "hint": np.stack([hints.picture(s, hint, path=path) for s in found]),
        "foreground": np.stack([s["masks"].any(0) for s in found]),
        "depth": np.stack([s["depth"] for s in found]),
    }

"""What runs in the place of a documents' command: the same at its smallest, or why nothing does."""

import re
import sys
from typing import NamedTuple

from tests.docs import commands

PYTHON = sys.executable
# Commands that no test of the documents runs, by their first words, and why.
NOT_RUN = {
    ("hf", "download"): "gigabytes of published weights",
    ("playwright", "install"): "a browser is the machine's",
    ("ssh", "-L"): "another machine",
    (".ci/run", "notebooks"): "tests/test_ci.py has it run with stand-ins; tests/notebooks",
    ("python", "-m", "mkdocs", "serve"): "serves what `mkdocs build` makes",
}
SHELL = {".", "git", "ruff", "sed"}
LAUNCHERS = {"bash", "sbatch", "kubectl"}  # of a file whose last command is what every host runs
OURS = {"train", "train.plan", "train.cache", "eval", "eval.benchmark",
        "eval.benchmark_start", "eval.claims",
        "eval.roofline", "eval.controlnet_xs", "eval.ediffi", "eval.metrics.scene_accuracy",
        "cnxs_jax.sample", "cnxs_jax.convert",
        "cnxs_jax.demo", "cnxs_jax.data.clip_tokenizer"}  # fmt: skip
OTHERS = {"venv", "pip", "mkdocs"}  # modules that run as they are
PUBLISHED = re.compile(r":xl_\d+$")
SMALL = {  # smallest settings that still go through every part
    "eval": ["--num_prompts=4", "--num_real=8", "--steps=1", "--reference_steps=1"],
    "eval.metrics.scene_accuracy": ["--scenes=8", "--steps=1", "--directory=runs/checker"],
    "eval.benchmark": ["--size=tiny", "--repeats=1", "--steps=1"],
    "eval.benchmark_start": ["--size=tiny"],
    "eval.claims": ["--size=tiny"],
    "eval.roofline": ["--size=tiny"],
    "eval.controlnet_xs": ["--seeds=0", "--steps=1", "--number=8", "--num_real=8"],
    "eval.ediffi": ["--number=8"],
    "cnxs_jax.sample": ["--steps=2"],
    "train.cache": ["--shard=0/1"],
}
CASCADE = [  # a cascade to 64 px: `:smoke` of this recipe stops at 32
    f"--config.{stage}.{key}"
    for stage in ("shared", "longer", "sr32", "sr64")
    for key in ("steps=1", "optimizer.warmup_steps=1")
] + ["--config.finish.num_heldout=16", "--config.finish.num_pictures=4"]


class Run(NamedTuple):
    """Words of a command. `hosts`: how many at once, with {port} and {id}. `serves`: a page."""

    words: list
    hosts: int = 0
    serves: bool = False


def plan(words):
    """The `Run` in the place of a command, or a text: why nothing runs."""
    settings = [w for n, w in enumerate(words) if all("=" in v for v in words[: n + 1])]
    words = words[len(settings) :]
    for first, why in NOT_RUN.items():
        if tuple(words[: len(first)]) == first:
            return why
    if words[0] in LAUNCHERS:
        return plan(commands.inside(words[-1]))
    module, arguments = commands.module_of(words)
    if words[0] == "pip":
        return Run([PYTHON, "-m", *installed(words)])
    if words[0] in SHELL:  # no editor opens for a message
        return Run([*words, "-m", "a change"] if words == ["git", "commit"] else words)
    if module is None:
        assert words[0] == "python", words
        return Run([PYTHON, *words[1:]])
    if module == "pytest":  # tests are run by their own name: these are there
        return Run([PYTHON, "-m", "pytest", *arguments, "--collect-only", "-q"])
    assert module in OURS | OTHERS, words
    if module == "cnxs_jax.demo":
        return Run(arguments, serves=True)
    arguments = smallest(module, arguments) if module in OURS else arguments
    hosts = max([int(a.split("=")[1]) for a in arguments if "--num_processes=" in a], default=0)
    return Run(["env", *settings, PYTHON, "-m", module, *arguments], hosts)


def installed(words):
    """Into this environment nothing: resolved alone, or a package by itself into a folder."""
    return [*words, "--target=packages" if "--no-deps" in words else "--dry-run"]


def smallest(module, arguments):
    """A command's arguments at their smallest."""
    line = " ".join(arguments)
    small = SMALL.get(module, [])
    if module in ("train", "train.plan", "train.cache"):
        arguments = [PUBLISHED.sub(":smoke", a) for a in arguments]
    if module in ("train", "train.cache"):  # what a figure was made with goes the smoke way, too
        lengths = ("--config.report", "--config.steps", "--config.optimizer.warmup_steps")
        arguments = [a for a in arguments if not a.startswith(lengths)]
        arguments = [a + ":smoke" if a.startswith("--config=") and ":" not in a else a
                     for a in arguments]  # fmt: skip
        arguments = [a.replace("=/mnt/", "=mnt/") for a in arguments]
    if "--config.data.buckets=True" in arguments:  # buckets begin at 256 px
        arguments = [*arguments, "--config.data.size=256"]
    if "--distributed" in arguments:  # one process in the place of a cluster
        alone = ["--coordinator=localhost:{port}", "--num_processes=1", "--process_id=0"]
        arguments = [a for a in arguments if a != "--distributed"] + alone
    if module == "train" and "localhost:9876" in line:  # the page's two terminals
        arguments = [a.replace("9876", "{port}") for a in arguments]
        arguments = [a.replace("_id=0", "_id={id}") for a in arguments]
    if "configs/ediffi.py:shipped" in line:
        small = CASCADE
    if module == "eval" and "controlnet_xs" in line:  # of a run that went the smoke way; no depth
        arguments = [a + ":smoke" if a.startswith("--config=") else a for a in arguments]
        arguments = [a.replace(",control_depth", "") for a in arguments]
    if module == "eval.ediffi" and "--study=experts" in arguments:
        small = [*small, "--arms=two,shared", "--seeds=0", "--steps=1"]
    if module == "cnxs_jax.convert" and arguments[0].endswith("512x512.pth"):
        small = ["--config=cnxs_jax/assets/pixart_tiny/transformer/config.json"]  # is the tiny one
    names = tuple(e.split("=")[0] + "=" for e in small)
    return [a for a in arguments if not a.startswith(names)] + small

"""Every command that the documents show is understood; the slow tests run them at their smallest.

A command with a mistake in a flag, a config key, a variant or a file's name fails here.
"""

import importlib
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cnxs_jax import sample
from cnxs_jax.convert import __main__ as convert
from tests.checks import record
from tests.docs import commands
from train import validate

ROOT = commands.ROOT
# Beside `python -m ...`: what else the documents may tell a reader to type, by its first word.
TOOLS = {
    "pip", "python", "python3.11", ".", "git", "ruff", "hf", "sbatch", "bash", "kubectl",
    "set", "xpk", "srun",
}  # fmt: skip
# Run by tests of their own, or not about this project.
MODULES = {"pytest", "venv", "pip", "mkdocs"}
OURS = {"train", "eval", "eval.benchmark", "eval.metrics.scene_accuracy", "cnxs_jax.sample",
        "cnxs_jax.convert"}  # fmt: skip
EVERY = [(path.relative_to(ROOT), words) for path in commands.DOCUMENTS
         for words in commands.shown(path)]  # fmt: skip
EVERY += [(path, words) for path in commands.EXAMPLES
          for words in commands.split((ROOT / path).read_text())]  # fmt: skip


def unwrap(words):
    """XPK carries the command in an argument, environment settings stand in front of others."""
    inner = [w.removeprefix("--command=") for w in words if w.startswith("--command=")]
    words = inner[0].split() if inner else words
    return [w for i, w in enumerate(words) if "=" not in w or i > 0]


def config_of(arguments):
    """The recipe of `--config=...` with the `--config.key=value` of the command line, checked."""
    path, *overrides = [a for a in arguments if a.startswith("--config")]
    name, _, variant = path.removeprefix("--config=").partition(":")
    assert (ROOT / name).is_file(), name
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    config = module.get_config(*([variant] if variant else []))
    for override in overrides:
        key, _, value = override.removeprefix("--config.").partition("=")
        place, *_, leaf = [config, *key.split(".")]
        for part in key.split(".")[:-1]:
            place = place[part]
        kind = type(place[leaf]) if place[leaf] is not None else str
        place[leaf] = value == "True" if kind is bool else kind(value)
    validate.check(config)
    return config


def flags_of(module):
    """Names of the absl flags that a main module defines; its source is read, not imported."""
    import re

    source = (ROOT / module.replace(".", "/")).with_suffix(".py")
    if not source.is_file():
        source = ROOT / module.replace(".", "/") / "__main__.py"
    text = source.read_text(encoding="utf-8")
    return set(re.findall(r'(?:DEFINE_\w+\(\s*|add_argument\()"(?:--)?(\w+)"', text))


@pytest.mark.parametrize(("page", "words"), EVERY, ids=lambda v: " ".join(v)[:60]
                         if isinstance(v, list) else str(v))  # fmt: skip
def test_understood(page, words):
    words = unwrap(words)
    if not words:
        return
    module, arguments = commands.module_of(words)
    if module is None:
        assert words[0] in TOOLS, f"{page}: {words}"
        for word in words[1:]:  # files of the repository that it names
            if word.startswith("docs/"):
                assert (ROOT / word).is_file(), word
        return
    assert module in OURS | MODULES, f"{page}: {module}"
    if module == "cnxs_jax.sample":
        sample.parse([a for a in arguments if not a.startswith("--model=")])
    elif module == "cnxs_jax.convert":
        convert.parser().parse_args(arguments)
    elif module == "pytest":
        for word in arguments:
            assert not word.startswith("tests/") or (ROOT / word).exists(), word
    elif module in OURS:
        given = {a.removeprefix("--").split("=")[0] for a in arguments if a.startswith("--")}
        unknown = {g for g in given if not g.startswith("config")} - flags_of(module)
        assert not unknown, f"{page}: {module} has no {unknown}"
        if any(a.startswith("--config=") for a in arguments):
            config_of(arguments)


# --- the same, executed ----------------------------------------------------------------------

# What needs the network, a cluster or a published file of gigabytes.
ELSEWHERE = (":xl_", "PixArt-XL-2-512x512.pth", "localhost:9876", "pixart_xl")
SMALL = {  # smallest settings that still go through every part
    "eval": ["--num_prompts=4", "--num_real=8", "--steps=1", "--reference_steps=1"],
    "eval.metrics.scene_accuracy": ["--scenes=8"],
    "cnxs_jax.sample": ["--steps=2"],
}


def smallest(module, arguments):
    """The command's arguments at their smallest, or None where it cannot be run here."""
    line = " ".join(arguments)
    if any(word in line for word in ELSEWHERE) or "--fit" in arguments:
        return None
    if module == "train":  # what a figure was made with goes the smoke way, too
        arguments = [
            a for a in arguments if not a.startswith(("--config.report", "--config.steps"))
        ]
        arguments = [a + ":smoke" if a.startswith("--config=") and ":" not in a else a
                     for a in arguments]  # fmt: skip
    extra = SMALL.get(module, [])
    names = tuple(e.split("=")[0] + "=" for e in extra)
    return [a for a in arguments if not a.startswith(names)] + extra


@pytest.fixture
def checkout(tmp_path):
    """A directory that looks like the checkout, where runs may be written; and some pictures."""
    for name in ("cnxs_jax", "train", "eval", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for n in range(10):
        pixels = rng.integers(0, 256, (40 + 3 * n, 56, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{n}.png")
        (tmp_path / "photos" / f"{n}.txt").write_text(f"a crab, picture {n}")
    return tmp_path


def run(command, cwd):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(cwd)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    shown = " ".join(str(c) for c in command[1:])
    assert done.returncode == 0, f"{shown}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"


def steps_of(path):
    """Commands and Python blocks of a page, in their order: ("shell", ...) or ("python", ...)."""
    text = path.read_text(encoding="utf-8")
    found = [(text.index(b.splitlines()[0]), "python", b) for b in commands.blocks(path, "python")]
    for block in commands.blocks(path, "bash"):
        start = text.index(block.splitlines()[0].split("  ")[0])
        found += [(start, "shell", words) for words in commands.split(block)]
    return [(kind, content) for _, kind, content in sorted(found, key=lambda f: f[0])]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/start.md", "docs/distil.md", "docs/controller.md",
                                  "docs/port.md", "docs/methods.md", "docs/notebooks.md",
                                  "docs/results/pixart_lcm.md"])  # fmt: skip
def test_executed(page, checkout):
    """Trains, draws, converts and evaluates, page by page, as a reader would."""
    start, ran = time.monotonic(), 0
    for kind, content in steps_of(ROOT / page):
        if kind == "python":
            run([sys.executable, "-c", content], checkout)
            ran += 1
            continue
        module, arguments = commands.module_of(unwrap(content))
        if module not in OURS:
            continue
        arguments = smallest(module, arguments)
        if arguments is not None:
            run([sys.executable, "-m", module, *arguments], checkout)
            ran += 1
    assert ran, page
    record(f"commands of {page}", run=ran, seconds=round(time.monotonic() - start))

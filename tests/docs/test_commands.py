"""Every command that the documents show is understood; the slow tests run them at their smallest.

A command with a mistake in a flag, a config key, a variant or a file's name fails here.
"""

import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cnxs_jax import sample
from cnxs_jax.convert import __main__ as convert
from cnxs_jax.demo import __main__ as demo
from tests.checks import record
from tests.docs import commands
from train import loop, validate

ROOT = commands.ROOT
# Beside `python -m ...`: what else the documents may tell a reader to type, by its first word.
TOOLS = {
    "pip", "python", "python3.11", ".", "git", "ruff", "hf", "sbatch", "bash", "kubectl",
    "set", "xpk", "srun",
}  # fmt: skip
# Run by tests of their own, or not about this project.
MODULES = {"pytest", "venv", "pip", "mkdocs"}
OURS = {"train", "train.plan", "train.cache", "eval", "eval.benchmark", "eval.claims",
        "eval.roofline", "eval.controlnet_xs", "eval.ediffi", "eval.metrics.scene_accuracy",
        "cnxs_jax.sample", "cnxs_jax.convert",
        "cnxs_jax.demo", "cnxs_jax.data.clip_tokenizer"}  # fmt: skip
EVERY = [(path.relative_to(ROOT), words) for path in commands.DOCUMENTS
         for words in commands.shown(path)]  # fmt: skip
EVERY += [(path, words) for path in commands.EXAMPLES
          for words in commands.split((ROOT / path).read_text())]  # fmt: skip
EVERY.append((commands.JOBSET, commands.container()["command"]))


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
        *parents, leaf = key.split(".")
        place = functools.reduce(lambda table, name: table[name], parents, config)
        kind = type(place[leaf]) if place[leaf] is not None else str
        place[leaf] = value == "True" if kind is bool else kind(value)
    validate.check(config)
    return config


def flags_of(module):
    """Names of the absl flags that a main module defines; its source is read, not imported."""
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
            if word.startswith(("docs/", "tests/", "notebooks/")):
                assert (ROOT / word).is_file(), word
        return
    assert module in OURS | MODULES, f"{page}: {module}"
    if module == "cnxs_jax.sample":
        there = f"--image={ROOT / 'docs/results/pictures/pixart_control.png'}"
        arguments = [there if a.startswith("--image=") else a for a in arguments]
        sample.parse([a for a in arguments if not a.startswith("--model=")])
    elif module == "cnxs_jax.demo":  # a server; tests/demo runs it
        demo.parse(arguments)
    elif module == "cnxs_jax.convert":
        convert.parser().parse_args(arguments)
    elif module == "pytest":
        for word in arguments:
            file = word.partition("::")[0]
            assert not word.startswith("tests/") or (ROOT / file).exists(), word
    elif module in OURS:
        given = {a.removeprefix("--").split("=")[0] for a in arguments if a.startswith("--")}
        known = flags_of(module)
        known |= {f"no{name}" for name in known}  # absl's negation
        unknown = {g for g in given if not g.startswith("config")} - known
        assert not unknown, f"{page}: {module} has no {unknown}"
        if any(a.startswith("--config=") for a in arguments):
            config_of(arguments)


def test_the_clusters_processes_and_chips_agree():
    job = commands.jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    chips = commands.container()["resources"]["limits"]["google.com/tpu"] * job["parallelism"]
    topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert chips == np.prod([int(n) for n in topology.split("x")])


def test_what_ray_calls_is_there():
    source = (ROOT / "docs" / "examples" / "ray_train.py").read_text(encoding="utf-8")
    compile(source, "ray_train.py", "exec")
    assert 'loop.main(config, settings["workdir"], resume=True)' in source
    assert list(inspect.signature(loop.main).parameters) == ["config", "workdir", "resume"]
    config_of(["--config=configs/pixart_lcm.py:xl_512", "--config.teacher_path=somewhere"])


# --- the same, executed ----------------------------------------------------------------------

# What needs the network, a cluster or a published file of gigabytes.
ELSEWHERE = (":xl_", "hint=hed", "PixArt-XL-2-512x512.pth", "localhost:9876")
PUBLISHED = re.compile(r":xl_\d+$")  # where the small model goes the same way
SMALL = {  # smallest settings that still go through every part
    "eval": ["--num_prompts=4", "--num_real=8", "--steps=1", "--reference_steps=1"],
    "eval.metrics.scene_accuracy": ["--scenes=8"],
    "eval.benchmark": ["--size=tiny", "--repeats=1", "--steps=1"],
    "cnxs_jax.sample": ["--steps=2"],
    "train.cache": ["--shard=0/1"],
}


def smallest(module, arguments):
    """The command's arguments at their smallest, or None where it cannot be run here."""
    if module in ("train.plan", "train.cache") or "--config.data.source=features" in arguments:
        arguments = [PUBLISHED.sub("", a) for a in arguments]
    line = " ".join(arguments)
    if any(word in line for word in ELSEWHERE) or "--fit" in arguments:
        return None
    if module in ("train", "train.cache"):  # what a figure was made with goes the smoke way, too
        arguments = [
            a for a in arguments if not a.startswith(("--config.report", "--config.steps"))
        ]
        arguments = [a + ":smoke" if a.startswith("--config=") and ":" not in a else a
                     for a in arguments]  # fmt: skip
    if module == "eval" and "controlnet_xs" in line:  # of a run that went the smoke way; no depth
        arguments = [a + ":smoke" if a.startswith("--config=") else a for a in arguments]
        arguments = [a.replace(",control_depth", "") for a in arguments]
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
        name = f"{n}" if n else "cat"  # the one that the documents name
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.jpg")
        (tmp_path / "photos" / f"{name}.txt").write_text(f"a crab, picture {n}")
    return tmp_path


def run(command, cwd):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(cwd)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    shown = " ".join(str(c) for c in command[1:])
    assert done.returncode == 0, f"{shown}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", [
    "README.md", "docs/start.md", "docs/distil.md", "docs/controller.md", "docs/experts.md",
    "docs/memory.md", "docs/port.md", "docs/methods.md", "docs/notebooks.md",
    "docs/results/benchmark.md", "docs/results/pixart_lcm.md",
])  # fmt: skip
def test_executed(page, checkout):
    """Trains, draws, converts and evaluates, page by page, as a reader would."""
    start, ran, text = time.monotonic(), 0, (ROOT / page).read_text(encoding="utf-8")
    for language, block in commands.fenced(ROOT / page):
        todo = [["-c", block]] if language == "python" else []
        for words in commands.split(block) if language == "bash" else []:
            module, arguments = commands.module_of(unwrap(words))
            arguments = smallest(module, arguments) if module in OURS else None
            todo += [] if arguments is None else [["-m", module, *arguments]]
        for arguments in todo:
            printed = run([sys.executable, *arguments], checkout)
            ran += 1
            for line in printed.splitlines():  # a table on a page is what its command prints
                assert language != "python" or not line.startswith("| ") or line in text, line
    assert ran, page
    record(f"commands of {page}", run=ran, seconds=round(time.monotonic() - start))

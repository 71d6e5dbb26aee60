"""Every command that the documents show is understood; `test_executed.py` runs them.

A command with a mistake in a flag, a config key, a variant or a file's name fails here.
"""

import ast
import functools
import importlib
import inspect
import re

import numpy as np
import pytest

from cnxs_jax import sample
from cnxs_jax.convert import __main__ as convert
from cnxs_jax.demo import __main__ as demo
from tests.docs import commands
from tests.docs.small import OURS
from train import loop, validate

ROOT = commands.ROOT
# Beside `python -m ...`: what else the documents may tell a reader to type, by its first word.
TOOLS = {
    "pip", "python", "python3.11", ".", "git", "ruff", "hf", "sbatch", "bash", "kubectl",
    "set", "xpk", "srun", "sed", ".ci/run",
    "playwright", "ssh", "trap",
}  # fmt: skip
# Run by tests of their own, or not about this project.
MODULES = {"pytest", "venv", "pip", "mkdocs"}
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
        kind = {bool: "True".__eq__, tuple: ast.literal_eval}.get(kind, kind)
        place[leaf] = kind(value)
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
                assert list(ROOT.glob(word)), word
        return
    assert module in OURS | MODULES, f"{page}: {module}"
    if module == "cnxs_jax.sample":
        there = f"--image={ROOT / 'docs/results/pictures/pixart_control.png'}"
        arguments = [there if a.startswith("--image=") else a for a in arguments]
        reference = there.replace("--image", "--style_image")
        arguments = [reference if a.startswith("--style_image=") else a for a in arguments]
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

"""Mistakes on the command lines of `eval`: one message and exit code 2, before anything is read.

The flags of two commands cannot be defined in one process, so that each has its own here.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from cnxs_jax.errors import ConfigError
from cnxs_jax.sample import DEFAULT_MODEL
from eval import benchmark, benchmark_start, claims, roofline

DRIVER = """
import importlib, json, sys
from absl.testing import flagsaver
from cnxs_jax import errors
main = importlib.import_module(sys.argv[1]).main
for words in json.loads(sys.argv[2]):
    with flagsaver.flagsaver():
        try:
            said = [0, main(errors.parse_flags(["command", *words]))]
        except errors.CnxsError as error:
            said = [error.code, str(error)]
        except BaseException as error:
            said = [1, repr(error)]
    print("SAID", json.dumps(said))
"""


def refusals(module, given, cases):
    """Asserts that each of `cases` (word, what is said) after the words `given` is refused."""
    lines = json.dumps([[*map(str, given), *word.split()] for word, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, module, lines], capture_output=True, text=True
    )
    said = [json.loads(s[5:]) for s in done.stdout.splitlines() if s.startswith("SAID ")]
    assert len(said) == len(cases), done.stderr[-2000:]
    for (word, expected), (code, text) in zip(cases, said, strict=True):
        assert code == 2, f"{word}: {text}"
        assert expected in text, f"{word}: {text}"


def test_eval(tmp_path):
    (tmp_path / "file").write_text("a tiger\n")
    given = [f"--pipeline={DEFAULT_MODEL}", f"--prompts={tmp_path / 'file'}"]
    given += [f"--out={tmp_path / 'out'}", "--metrics=agreement", "--sweep", "steps=1,2"]
    refusals("eval.__main__", given, [
        ("--size=-3", "--size=-3"),
        ("--size=0", "--size=0"),
        ("--num_prompts=-3", "--num_prompts=-3"),
        ("--num_prompts=0", "--num_prompts=0"),
        ("--num_real=-1", "--num_real=-1"),
        ("--reference_steps=0", "--reference_steps=0"),
        ("--batch_size=0", "--batch_size=0"),
        ("--seed=-1", "--seed=-1"),
        ("--seed=4294967296", "--seed=4294967296"),
        ("--guidance_scale=-1", "--guidance_scale=-1"),
        ("--guidance_scale=nan", "--guidance_scale=nan"),
        ("--guidance_scale=inf", "--guidance_scale=inf"),
        ("--steps=0", "positive whole numbers"),
        ("--steps=4,-1", "positive whole numbers"),
        ("--steps=x", "positive whole numbers"),
        ("--metrics=agreemet", 'Did you mean "agreement"'),
        ("--metrics=", "no metrics"),
        ("--features=efflite", 'Did you mean "efflite0"'),
        ("--weights clp=x", 'Did you mean "clip"'),
        ("--prompts=absent", "no such file or folder"),
        (f"--out={tmp_path / 'file'}", "is no directory [--out]"),
        (f"--out= --workdir={tmp_path / 'file'}", "is no directory [--workdir]"),
        (
            f"--metrics=retrieval --weights clip={tmp_path}",
            "'retrieval' needs 2 pictures or more, got 1",
        ),
    ])  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_ediffi(tmp_path):
    (tmp_path / "file").write_text("")
    given = ["--study=experts", f"--out={tmp_path / 'out'}", f"--runs={tmp_path / 'runs'}"]
    refusals("eval.ediffi.__main__", given, [
        ("--study=expert", 'Did you mean "experts"'),
        ("--number=7", "--number=7"),
        ("--steps=0", "--steps=0"),
        ("--seed=4294967296", "--seed=4294967296"),
        ("--seeds=\u00b2", "different whole numbers"),
        ("--arms=shard", 'Did you mean "shared"'),
        ("--guidance=3,-1", "3,-1 are no different scales"),
        ("--guidance=3,3", "3,3 are no different scales"),
        ("--guidance=3", "nothing is drawn"),
        ("--guidance=high", "high are no different scales"),
        ("--study=painting,style --cascade=x --guidance=3", "not all of these studies"),
        (f"--out={tmp_path / 'file'}", "is no directory [--out]"),
        (f"--runs={tmp_path / 'file'}", "is no directory [--runs]"),
    ])  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_controlnet_xs(tmp_path):
    (tmp_path / "file").write_text("")
    given = [f"--out={tmp_path / 'out'}", f"--runs={tmp_path / 'runs'}"]
    refusals("eval.controlnet_xs.__main__", given, [
        ("--study=type", 'Did you mean "types"'),
        ("--number=7", "--number=7"),
        ("--num_real=2", "--num_real=2"),
        ("--steps=0", "--steps=0"),
        ("--seeds=-1", "different whole numbers"),
        (f"--out={tmp_path / 'file'}", "is no directory [--out]"),
        (f"--runs={tmp_path / 'file'}", "is no directory [--runs]"),
    ])  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", [benchmark, claims, roofline], ids=lambda m: m.__name__)
def test_a_file_is_no_directory_of_figures(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    out = SimpleNamespace(value=str(tmp_path / "file"))
    monkeypatch.setattr(command, "OUT", out, raising=False)
    with pytest.raises(ConfigError, match="is no directory.*--out"):
        command.main(["command"])


def test_an_unknown_case_is_named(monkeypatch):
    case = SimpleNamespace(value="unet_sd15_51")
    monkeypatch.setattr(benchmark_start, "CASE", case, raising=False)
    with pytest.raises(ConfigError, match='Did you mean "unet_sd15_512"'):
        benchmark_start.main(["command"])

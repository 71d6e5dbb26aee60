"""What CI runs, with stand-ins for the interpreters: what is missing is skipped, failures count."""

import os
import pathlib
import shutil
import subprocess

import pytest

RUN = pathlib.Path(__file__).parents[1] / ".ci" / "run"
# `python -m venv DIR` leaves programs that note how they were called; FAILS names one that fails.
PYTHON = """#!/bin/sh
[ "$1" = -V ] && exit 0
mkdir -p "$3/bin"
for name in pip ruff python; do
  printf '#!/bin/sh\\necho "called %s $*"\\ncase "%s $*" in "$FAILS"*) exit 1;; esac\\n' \\
    $name $name > "$3/bin/$name"
  chmod +x "$3/bin/$name"
done
"""


@pytest.fixture
def ci(tmp_path):
    """`run(versions, fails)`: the script where only these Pythons are installed."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "sh", "dirname", "mktemp", "rm", "mkdir", "chmod"):
        (programs / name).symlink_to(shutil.which(name))

    def run(versions, fails="nothing", *arguments):
        for version in versions:
            (programs / f"python{version}").write_text(PYTHON)
            (programs / f"python{version}").chmod(0o755)
        env = {"PATH": str(programs), "HOME": str(tmp_path), "FAILS": fails}
        env |= {"TMPDIR": os.environ["TMPDIR"]} if "TMPDIR" in os.environ else {}
        command = [programs / "bash", RUN, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    return run


def test_missing_interpreters_are_named_and_skipped(ci):
    done = ci([])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped") == 4
    done = ci(["3.12"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped") == 3
    assert "called python -m pytest" in done.stdout


@pytest.mark.parametrize("fails", ["ruff check", "ruff format", "python -m pytest", "pip install"])
def test_a_failure_fails(ci, fails):
    assert "called ruff format" in ci(["3.11"]).stdout
    assert ci(["3.11"], fails).returncode != 0


def test_what_the_ends_run_and_leave_out_is_there(ci):
    lines = ci(["3.12", "3.13"]).stdout.splitlines()
    calls = [line.split(" -n 2 ")[1] for line in lines if "-m pytest" in line]
    assert len(calls) == 2
    assert calls[0] == calls[1]
    paths = [word.removeprefix("--ignore=") for word in calls[0].split() if "tests/" in word]
    assert {"tests/models", "tests/train", "tests/test_ci.py"} <= set(paths)
    assert all((RUN.parents[1] / path).exists() for path in paths)


def test_all_notebooks_on_the_oldest_and_the_newest_jax(ci):
    done = ci(["3.11", "3.12", "3.13"], "nothing", "notebooks")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("== notebooks-") == 2
    assert "constraints-colab.txt" in done.stdout.split("== notebooks-newest")[0]
    calls = [line for line in done.stdout.splitlines() if "-m pytest" in line]
    assert len(calls) == 2
    assert all("tests/notebooks" in call and "(slow)or(not(slow))" in call for call in calls)
    assert ci(["3.12"], "python -m pytest", "notebooks").returncode != 0

"""The log of the slow checks, written by several processes at once."""

import json
import os
import subprocess
import sys
import threading

import pytest

from tests import checks

LEVEL = "--xla_backend_optimization_level"


def test_no_entry_of_simultaneous_checks_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "LOG", tmp_path / "results" / "checks.json")
    together = threading.Barrier(12)

    def one(number):
        together.wait()
        checks.record("a check", number=number)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = json.loads(checks.LOG.read_text())
    assert sorted(e["figures"]["number"] for e in entries) == list(range(12))
    assert [p.name for p in checks.LOG.parent.iterdir()] == ["checks.json"]


@pytest.mark.parametrize(
    ("flags", "noted"),
    [
        ("", "its own optimization level"),
        ("--xla_dump_to=x", "its own optimization level"),
        (f" {LEVEL}=0", "optimization level 0"),
        (f"{LEVEL}=0 --xla_dump_to=x {LEVEL}=2", "optimization level 2"),
        ("flags.txt", "flags of flags.txt"),
    ],
)
def test_an_entry_says_how_far_xla_optimized(flags, noted, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "LOG", tmp_path / "checks.json")
    monkeypatch.setenv("XLA_FLAGS", flags)
    checks.record("a check", number=1)
    checks.record("a check of another process", {"XLA_FLAGS": f"{LEVEL}=1"}, number=1)
    own, other = json.loads(checks.LOG.read_text())
    assert own["xla"] == noted
    assert other["xla"] == "optimization level 1"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (None, f"{LEVEL}=0"),
        ("--xla_dump_to=x", f"--xla_dump_to=x {LEVEL}=0"),
        (f"{LEVEL}=3", f"{LEVEL}=3"),
        (f"{LEVEL}=2 --xla_dump_to=x", f"{LEVEL}=2 --xla_dump_to=x"),
        ("flags.txt", "flags.txt"),  # words after a file's name would be a part of it
    ],
)
def test_the_users_level_wins(given, used):
    code = "import os, runpy; runpy.run_path('tests/conftest.py'); print(os.environ['XLA_FLAGS'])"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"XLA_FLAGS": given} if given else {}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=checks.ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == used, done.stderr

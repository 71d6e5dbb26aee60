"""Slow checks write what they found to docs/results/checks.json: date, commit, command, figures."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import platform
import re
import subprocess

from cnxs_jax.storage import write_json

ROOT = pathlib.Path(__file__).parents[1]
LOG = ROOT / "docs" / "results" / "checks.json"


def described():
    """The commit of the code that is checked, "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


COMMIT = described()  # when the checks begin: they may take an hour, and the checkout moves on


def record(name, environment=None, **figures):
    """Appends one entry, whole or not at all. Figures are numbers or short strings.

    Args:
        environment: variables of the process that was checked, if it is not this one.
    """
    entry = {
        "check": name,
        "date": datetime.date.today().isoformat(),
        "commit": COMMIT,
        "command": f"pytest -m slow {os.environ.get('PYTEST_CURRENT_TEST', '').split(' ')[0]}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "xla": optimization(environment or os.environ),
        "figures": figures,
    }
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with locked(LOG.parent):
        entries = json.loads(LOG.read_text()) if LOG.is_file() else []
        write_json(LOG, [*entries, entry], sort_keys=False)  # killed, it leaves the old file


def optimization(environment):
    """Which of XLA's optimization levels `XLA_FLAGS` asks for; of several the last one counts."""
    flags = environment.get("XLA_FLAGS", "").strip()
    if flags[:1] not in ("", "-"):
        return f"flags of {flags}"
    found = re.findall(r"--xla_backend_optimization_level=(\S+)", flags)
    return f"optimization level {found[-1]}" if found else "its own optimization level"


@contextlib.contextmanager
def locked(directory):
    """One process or thread at a time; the lock is the directory's own, and leaves no file."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

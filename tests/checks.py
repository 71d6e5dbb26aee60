"""Slow checks write what they found to docs/results/checks.json: date, commit, command, figures."""

import datetime
import json
import os
import pathlib
import platform
import subprocess

ROOT = pathlib.Path(__file__).parents[1]
LOG = ROOT / "docs" / "results" / "checks.json"


def record(name, **figures):
    """Appends one entry. Figures are numbers or short strings."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    entry = {
        "check": name,
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "command": f"pytest -m slow {os.environ.get('PYTEST_CURRENT_TEST', '').split(' ')[0]}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "figures": figures,
    }
    entries = json.loads(LOG.read_text()) if LOG.is_file() else []
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text(json.dumps([*entries, entry], indent=1) + "\n")

"""The log of the slow checks, written by several processes at once."""

import json
import threading

from tests import checks


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

"""Small files: whole or not at all; and the paths of a config."""

import json

import pytest

from cnxs_jax import storage
from cnxs_jax.errors import ConfigError


def test_json_comes_back_and_leaves_no_other_file(tmp_path):
    storage.write_json(tmp_path / "a" / "b.json", {"z": 1, "a": [0.5, None]})
    storage.write_json(tmp_path / "a" / "b.json", {"z": 2, "a": []}, sort_keys=False)
    text = (tmp_path / "a" / "b.json").read_text()
    assert json.loads(text) == {"z": 2, "a": []}
    assert text.index('"z"') < text.index('"a"')
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.json"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    storage.write_text(path, "old")
    monkeypatch.setattr(storage.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        storage.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


def test_a_directory_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    storage.check_directory(tmp_path / "a" / "b", "--out")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="file is no directory.*--out"):
            storage.check_directory(path, "--out")
    monkeypatch.setattr(storage.os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written"):
        storage.check_directory(tmp_path / "a", "--out")


def test_others_may_read_what_was_written(tmp_path):
    (tmp_path / "plain").write_text("")
    storage.write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_paths_are_filled_wherever_they_are():
    given = {"a": "{workdir}/x", "b": ("{assets}", 3), "c": [{"d": "{workdir}"}]}
    filled = storage.fill(given, "/runs/1")
    assert filled == {"a": "/runs/1/x", "b": (str(storage.ASSETS), 3), "c": [{"d": "/runs/1"}]}
    assert (storage.ASSETS / "pixart_tiny").is_dir()

"""Report files, the picture grid and the quality plot."""

import json

import numpy as np
import pytest
from PIL import Image

from cnxs_jax.errors import DataError
from eval import pictures, report


def test_report_is_written_for_people_and_machines(tmp_path):
    rows = [
        {"method": "a|b", "objects": {"value": 0.951, "low": 0.9, "high": 0.98, "chance": 0.1}},
        {"method": "c", "steps": 4, "kid": "not run (why)", "psnr": float("inf")},
        {"method": "d", "steps": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 7}},
        {"method": "e", "steps": {"value": 0.5, "num_x": 7, "num_y": 0}},
    ]
    red = np.zeros((4, 6, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
    made = report.write_report(
        tmp_path / "new" / "dir",
        rows,
        [report.Picture("red", red, "A red field.")],
        title="Title",
        summary={"seconds": np.float32(2.5)},
        notes=["A note."],
    )
    text = made.read_text()
    assert text.index("pictures/red.png") < text.index("| method |") < text.index("A note.")
    assert "| a\\|b | 0.951 [0.9, 0.98] *chance 0.1* | - | - | - |" in text
    assert "| c | - | 4 | not run (why) | - |" in text
    assert "| d | - | 0.5 [0.4, 0.6] n=7 | - | - |" in text
    assert "| e | - | 0.5 n=7/? | - | - |" in text
    content = json.loads((made.parent / "report.json").read_text())
    assert content["rows"][0] == rows[0]
    assert content["rows"][1]["psnr"] is None
    assert content["summary"] == {"seconds": 2.5}
    np.testing.assert_array_equal(Image.open(made.parent / content["pictures"][0]["file"]), red)
    assert not list(made.parent.rglob("*.tmp*"))


def test_wide_rows_are_split_and_nothing_is_lost(tmp_path):
    rows = [{"method": "a", "x": 1, "y": 2, "z": 3}]
    groups = (("method", "x"), ("method", "absent"), ("method", "y"))
    text = report.write_report(tmp_path, rows, groups=groups).read_text()
    heads = [line for line in text.splitlines() if line.startswith("| method")]
    assert heads == ["| method | x |", "| method | y |", "| method | z |"]


def test_reports_refuse_what_they_cannot_show(tmp_path):
    field = np.zeros((4, 4, 3), np.uint8)
    twice = [report.Picture("a", field, ""), report.Picture("a", field, "")]
    with pytest.raises(DataError, match="share a name"):
        report.write_report(tmp_path, [], twice)
    with pytest.raises(DataError, match="dict"):
        report.write_report(tmp_path, [["a"]])
    with pytest.raises(DataError, match="uint8"):
        report.write_report(tmp_path, [], [report.Picture("a", field / 255.0, "")])


def test_grid_shows_each_sample_where_it_belongs():
    colours = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], np.uint8)
    columns = [(f"method {c}", np.tile(colours[c][:, None, None], (1, 8, 8, 1))) for c in range(2)]
    grid = np.asarray(pictures.sample_grid(columns, ["a short prompt", "word " * 40], tile=64))
    for column in range(2):
        middle = grid[:, pictures.MARGIN + column * (64 + pictures.MARGIN) + 32]
        for n in range(2):
            assert (middle == colours[column][n]).all(1).sum() == 64


def test_grid_refuses_columns_of_different_length():
    field = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match="one length"):
        pictures.sample_grid([("a", field), ("b", field[:1])], ["x", "y"])
    with pytest.raises(DataError, match="one length"):
        pictures.sample_grid([], [])


def test_plot_needs_a_figure():
    rows = [{"method": "student", "evaluations": 4, "kid": "not run"}]
    assert pictures.quality_plot(rows, {"kid": "KID"}) is None
    rows[0]["kid"] = {"value": 0.1, "low": 0.05, "high": 0.2}
    assert pictures.quality_plot(rows, {"kid": "KID"}).width > 300

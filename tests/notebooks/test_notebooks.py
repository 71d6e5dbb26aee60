"""The notebooks: their form, and what they show when they are executed at the tiny size.

`pytest -m slow tests/notebooks` runs all of them; the one without training runs in every suite.
"""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.checks import record

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTE = pathlib.Path(__file__).with_name("execute.py")
TILE, GAP, STRIP = 192, 2, 14  # of a sheet: pictures of 64 px three times as large


def cells(path, kind):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def execute(name, out, **values):
    """What a reader would see: [{"text", "picture"}] a code cell."""
    start = time.monotonic()
    settings = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, EXECUTE, ROOT / "notebooks" / f"{name}.ipynb", out, *settings],
        cwd=out.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "output.json").read_text()), time.monotonic() - start


def tiles(out, cell, rows, cols, labelled):
    """float [rows, cols, 192, 192, 3] in [0, 1] of a grid that a cell showed."""
    sheet = np.asarray(Image.open(out / cell["picture"]).convert("RGB"), np.float32) / 255
    strip = STRIP if labelled else 0
    height = rows * (TILE + GAP + strip) - GAP
    assert sheet.shape == (height, cols * (TILE + GAP) - GAP, 3)
    found = np.zeros((rows, cols, TILE, TILE, 3), np.float32)
    for r in range(rows):
        for c in range(cols):
            top, left = r * (TILE + GAP + strip) + strip, c * (TILE + GAP)
            found[r, c] = sheet[top : top + TILE, left : left + TILE]
    return found


def test_there_are_three():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"distil", "four_step_pictures", "pytorch_and_back"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [c["id"] for c in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
    for source in cells(path, "code"):  # plain Python: no magics, and the tests can run it
        ast.parse(source)
        assert "drive.mount" not in source
        assert all(len(line) <= 100 for line in source.splitlines())
    title, *_ = cells(path, "markdown")
    assert f"/blob/main/notebooks/{path.name})" in title
    assert "**Which accelerator:**" in title


def test_one_setup_and_one_repository():
    setups = {tuple(cells(path, "code")[:2]) for path in NOTEBOOKS}
    assert len(setups) == 1
    ((setup, _),) = setups
    repository = re.search(r'^REPOSITORY = "https://github.com/([^"]+)"$', setup, re.MULTILINE)[1]
    for path in NOTEBOOKS:
        linked = re.findall(r"github(?:\.com)?/([\w-]+/cnxs_jax)", path.read_text(encoding="utf-8"))
        assert set(linked) == {repository}


def test_a_checkpoint_comes_in_and_goes_back(tmp_path):
    out = tmp_path / "out"
    seen, _ = execute("pytorch_and_back", out, STEPS=4)
    text = "".join(cell["text"] for cell in seen)
    assert "blocks.0.attn.qkv.weight" in text
    assert "PixArt, 3,944,288 parameters" in text
    assert "the same names: True" in text
    both = tiles(out, seen[-1], 2, 2, labelled=True)
    first = tiles(out, next(c for c in seen if c["picture"]), 1, 2, labelled=False)
    np.testing.assert_array_equal(both[0], first[0])
    assert both.std(axis=(2, 3)).min() > 0.02  # pictures, not one colour
    # The shipped weights are bfloat16 already: what goes out is what came in.
    assert np.abs(both[1] - both[0]).max() <= 1 / 255


@pytest.mark.slow
def test_distil(tmp_path):
    out = tmp_path / "out"
    seen, seconds = execute("distil", out, STEPS=6)
    text = "".join(cell["text"] for cell in seen)
    losses = [float(x) for x in re.findall(r"'loss': ([\d.e-]+)", text)]
    assert len(losses) >= 2
    assert np.isfinite(losses).all()
    shown = [cell for cell in seen if cell["picture"]]
    before = tiles(out, shown[0], 2, 4, labelled=True)
    after = tiles(out, shown[-1], 3, 4, labelled=True)
    np.testing.assert_array_equal(after[:2], before)
    # Few evaluations without guidance blur; the student's pictures are pictures of their own.
    assert after.std(axis=(3, 4)).min() > 0.01
    assert np.abs(after[2] - after[1]).mean() > 0.01
    record("notebook distil, 6 steps", seconds=round(seconds))


@pytest.mark.slow
def test_four_step_pictures(tmp_path):
    out = tmp_path / "out"
    seen, seconds = execute("four_step_pictures", out, DISTIL_STEPS=2)
    shown = [cell for cell in seen if cell["picture"]]
    both = tiles(out, shown[1], 2, 4, labelled=True)
    np.testing.assert_array_equal(both[0], tiles(out, shown[0], 1, 4, labelled=False)[0])
    assert np.abs(both[1] - both[0]).mean() > 0.02
    painted = tiles(out, shown[-1], 3, 4, labelled=True)
    half, (red, green, blue) = TILE // 2, np.moveaxis(painted, -1, 0)
    frog = (green > red + 0.1) & (green > blue + 0.1)
    crab = (red > green + 0.3) & (red > blue + 0.3)
    moved = {}
    for name, seen_there in (("frog", frog), ("crab", crab)):
        right = seen_there[..., half:].mean((2, 3)) - seen_there[..., :half].mean((2, 3))
        moved[name] = float(right[2].mean() - right[1].mean())  # "crab | frog" less "frog | crab"
    assert moved["frog"] > 0.03, moved
    assert moved["crab"] < -0.03, moved
    record(
        "notebook four_step_pictures, 2 distillation steps",
        seconds=round(seconds),
        **{f"{name}_moved_right": round(value, 3) for name, value in moved.items()},
    )

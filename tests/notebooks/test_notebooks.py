"""The notebooks: their form, and what they show when they are executed at the tiny size.

`pytest -m "" tests/notebooks` runs all of them; the one without training runs in every suite.
Each has five minutes on two cores, compiled as for a reader who opens it for the first time.
"""

import ast
import itertools
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image

from cnxs_jax.control import hints
from eval.metrics.edges import edge_f1
from tests.checks import record
from train.log import StopSignal

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTE = pathlib.Path(__file__).with_name("execute.py")
PAINTED = ROOT / "docs" / "results" / "pictures" / "paint_with_words.png"
LIMIT = 300  # seconds
TILE, GAP, STRIP = 192, 2, 14  # of a sheet: pictures of 64 px three times as large


def cells(path, kind):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def readers_environment():
    """Without what `tests/conftest.py` sets to compile quickly, and nothing compiled before."""
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    flags = kept.pop("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if "xla_backend_optimization_level" not in flag]
    more = {"XLA_FLAGS": " ".join(flags), "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    return kept | more


def execute(name, out, **values):
    """What a reader would see: [{"text", "picture"}] a code cell; and the seconds it took.

    Seconds are the clock's or, where other programs hold it up, those of the processor: two cores
    of its own would not take longer.
    """
    start, used = time.monotonic(), processor_seconds()
    settings = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    done = subprocess.run(
        [sys.executable, EXECUTE, ROOT / "notebooks" / f"{name}.ipynb", out, *settings],
        cwd=out.parent, env=readers_environment(), capture_output=True, text=True,
        timeout=4 * LIMIT,
    )  # fmt: skip
    seconds = min(time.monotonic() - start, processor_seconds() - used)
    assert done.returncode == 0, done.stderr[-3000:]
    assert seconds < LIMIT, f"{name} took {seconds:.0f} s"
    return json.loads((out / "output.json").read_text()), seconds


def processor_seconds():
    """Of all programs that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def note(name, seconds, **figures):
    """Keeps what a run of a notebook found, and with which jax."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    figures = {"seconds": round(seconds), "python": python, "jax": jax.__version__, **figures}
    record(f"notebook {name}", readers_environment(), **figures)


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


def test_there_are_four():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"distil", "four_step_pictures", "own_controller", "pytorch_and_back"}


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


@pytest.mark.slow
def test_the_first_cell_installs_and_may_run_again(tmp_path):
    """As in Colab: the runtime has the packages and not the project; then a session restarted.

    The second process has what the first has installed, and a folder `cnxs_jax` beside it.
    """
    setup = cells(NOTEBOOKS[0], "code")[0]
    setup = re.sub(r"https://github.com/[^\"]+", f"file://{ROOT}", setup)
    assert f'"file://{ROOT}"' in setup
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    # On the path and not installed from: what is installed editable there is not seen.
    packages = pathlib.Path(np.__file__).parents[1]
    show = "\nimport cnxs_jax, configs\nprint(cnxs_jax.__file__)"
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        done = subprocess.run(
            [tmp_path / "env" / "bin" / "python", "-c", setup + show],
            cwd=tmp_path, env=readers_environment() | {"PYTHONPATH": str(packages)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found = done.stdout.split()[-1]
        assert found == str(tmp_path / "cnxs_jax" / "cnxs_jax" / "__init__.py")
        seconds.append(time.monotonic() - start)
    note("the first cell", seconds[0], again=round(seconds[1]))
    assert seconds[0] < 60


@pytest.mark.parametrize(("kernel", "ends"), [(True, KeyboardInterrupt), (False, SystemExit)])
def test_a_second_stop_ends_the_cell_and_not_the_session(kernel, ends, monkeypatch):
    """Outside of a notebook's kernel it ends the process at once."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if kernel:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(1)
        with pytest.raises(ends):
            signal.raise_signal(signal.SIGINT)


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
    assert len(shown) == 3
    sheets = np.asarray(Image.open(out / shown[1]["picture"]))
    thirds = np.array_split(sheets[: len(sheets) // 3 * 3], 3)  # after 2, 4 and 6 steps
    assert all(np.abs(a.astype(int) - b).mean() > 0.5 for a, b in itertools.pairwise(thirds))
    before = tiles(out, shown[0], 2, 4, labelled=True)
    after = tiles(out, shown[-1], 3, 4, labelled=True)
    np.testing.assert_array_equal(after[:2], before)
    contrast = after.std(axis=(2, 3)).min(-1)  # 3 rows of 4; an empty picture has next to none
    assert contrast[0].min() > 0.02
    assert np.median(contrast, 1).min() > 0.02  # few evaluations may miss a thing
    assert np.abs(after[2] - after[1]).mean() > 0.01
    note("distil, 6 steps", seconds)


@pytest.mark.slow
def test_four_step_pictures(tmp_path):
    out = tmp_path / "out"
    seen, seconds = execute("four_step_pictures", out, DISTIL_STEPS=2)
    shown = [cell for cell in seen if cell["picture"]]
    both = tiles(out, shown[1], 2, 4, labelled=True)
    np.testing.assert_array_equal(both[0], tiles(out, shown[0], 1, 4, labelled=False)[0])
    assert np.abs(both[1] - both[0]).mean() > 0.02
    rings, free, followed = tiles(out, shown[2], 3, 4, labelled=True)
    assert set(np.unique(rings)) == {0, 1}
    for ring, box in zip(rings, ((0, 32), (24, 56), (24, 48), (8, 32)), strict=True):
        rows = np.flatnonzero(ring.max((1, 2))) // 3  # where the outline was drawn
        assert (rows.min(), rows.max()) == box
    places = (slice(0, 96), slice(72, 168), slice(72, 144), slice(24, 96))  # in 3x pixels
    for n, (rows, picture) in enumerate(zip(places, followed, strict=True)):
        inked = (np.abs(picture - picture[0, 0]).max(-1) > 0.2).mean(1)  # the ball, by rows
        inside = inked[rows].sum() / max(inked.sum(), 1e-6)
        assert inside > 0.8, (n, inside)
    painted = tiles(out, shown[-1], 3, 4, labelled=True)
    shipped = np.asarray(Image.open(PAINTED).convert("RGB"), np.float32)  # of today's model
    sheet = np.asarray(Image.open(out / shown[-1]["picture"]).convert("RGB"), np.float32)
    assert np.abs(sheet - shipped).mean() < 3
    half, (red, green, blue) = TILE // 2, np.moveaxis(painted, -1, 0)
    frog = (green > red + 0.1) & (green > blue + 0.1)
    crab = (red > green + 0.3) & (red > blue + 0.3)
    moved = {}
    for name, seen_there in (("frog", frog), ("crab", crab)):
        right = seen_there[..., half:].mean((2, 3)) - seen_there[..., :half].mean((2, 3))
        moved[name] = float(right[2].mean() - right[1].mean())  # "crab | frog" less "frog | crab"
    assert moved["frog"] > 0.03, moved
    assert moved["crab"] < -0.03, moved
    figures = {f"{name}_moved_right": round(value, 3) for name, value in moved.items()}
    note("four_step_pictures, 2 distillation steps", seconds, **figures)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve pictures of several shapes, each a bright box on a dark ground."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for n in range(12):
        picture = Image.new("RGB", (50 + n, 60), tuple(rng.integers(0, 60, 3).tolist()))
        picture.paste(tuple(rng.integers(160, 256, 3).tolist()), (12, 14 + n, 36, 44 + n))
        picture.save(folder / f"{n:02d}.jpg")
        (folder / f"{n:02d}.txt").write_text(f"box number {n}")
    return str(folder)


@pytest.mark.slow
def test_controlnet_xs_on_drawn_pictures(tmp_path):
    text = controller_of_a_folder(tmp_path, "ControlNet-XS", STEPS=4)
    assert "configs.controlnet_xs: 100 pictures" in text
    assert "ControlNetXSAdapter" in text


@pytest.mark.slow
def test_controlnet_transformer_on_a_folder_of_photos(tmp_path, photos):
    values = {"BASE": "cnxs_jax/assets/pixart_tiny", "FOLDER": photos, "STEPS": 4}
    text = controller_of_a_folder(tmp_path, "ControlNet-Transformer", **values)
    assert "configs.pixart_control: 12 pictures, the last four: ['box number 8'" in text
    assert "PixArtControlNetAdapterModel" in text


def controller_of_a_folder(tmp_path, name, **values):
    """Runs the notebook, checks what it showed; its text."""
    out = tmp_path / "out"
    seen, seconds = execute("own_controller", out, **values)
    text = "".join(cell["text"] for cell in seen)
    losses = [float(x) for x in re.findall(r"'loss': ([\d.e-]+)", text)]
    assert len(losses) >= 2
    assert np.isfinite(losses).all()
    shown = [cell for cell in seen if cell["picture"]]
    kept = tiles(out, shown[0], 2, 4, labelled=False)
    final = tiles(out, shown[-1], 4, 4, labelled=True)
    np.testing.assert_array_equal(final[:2], kept)
    small = np.round(255 * final[:, :, ::3, ::3]).astype(np.uint8)
    lines = hints.canny(small[0])
    assert lines.any((1, 2, 3)).all()
    np.testing.assert_array_equal(lines, small[1] / 255)
    for row, printed in enumerate(re.findall(r"([\d.]+) of the lines found again", text), 2):
        found = hints.canny(small[row])[..., 0] > 0
        recall = edge_f1(found, lines[..., 0] > 0)["recall"].mean()
        assert abs(recall - float(printed)) < 1e-3
    assert row == 3
    assert np.abs(final[3] - final[2]).max() > 0  # a few steps have opened the zero layers
    note(f"own_controller, 4 steps, {name}", seconds)
    return text

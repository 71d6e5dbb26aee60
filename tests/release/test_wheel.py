"""The wheel in an environment of its own, outside the checkout: `pytest -m slow tests/release`.

It downloads what `pip install` downloads (about 1 GB installed) unless pip has it cached.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time
import zipfile

import pytest
from PIL import Image

import cnxs_jax
from tests.checks import record
from tests.demo.client import Server

ROOT = pathlib.Path(__file__).parents[2]
PROMPT = "a tiger left of a carrot, 3d style"


def run(*command, cwd):
    """The output of a command that must not fail; it sees nothing of this checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(folder):
    """The wheel of the tracked files; a `build/` in the checkout could bring in older ones."""
    source = folder / "source"
    source.mkdir()
    archive = folder / "source.tar"
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    names = [name for name in files.splitlines() if (ROOT / name).is_file()]
    (folder / "names").write_text("\n".join(names))
    run("tar", "-cf", archive, "-T", folder / "names", cwd=ROOT)
    run("tar", "-xf", archive, cwd=source)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_holds_the_library_its_models_and_their_licences(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name == f"cnxs_jax-{cnxs_jax.__version__}-py3-none-any.whl"
    tops = {name.split("/")[0] for name in names}
    assert tops == {"cnxs_jax", f"cnxs_jax-{cnxs_jax.__version__}.dist-info"}
    packed = {name for name in names if name.startswith("cnxs_jax/")}
    tracked = run("git", "ls-files", "cnxs_jax", cwd=ROOT).split()
    assert set(tracked) <= packed
    assert {"LICENSE", "LICENSE-DATA"} <= {name.split("/")[-1] for name in names}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python of an environment that has the wheel and what it needs, and the seconds it took."""
    start, folder = time.monotonic(), tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", f"{wheel}[demo]", cwd=folder)
    return python, time.monotonic() - start


@pytest.mark.slow
def test_sample_and_convert_outside_the_checkout(wheel, installed, tmp_path):
    python, install_seconds = installed
    start = time.monotonic()
    where = run(python, "-c", "import cnxs_jax; print(cnxs_jax.__file__)", cwd=tmp_path)
    assert str(python.parents[1]) in where

    drawn = tmp_path / "tiger.png"
    run(python, "-m", "cnxs_jax.sample", f"--prompt={PROMPT}", "--out=tiger.png", cwd=tmp_path)
    sampled = time.monotonic()
    with Image.open(drawn) as image:
        assert image.size == (64, 64)
        levels = len(set(image.convert("L").tobytes()))
        parameters = json.loads(image.text["cnxs_jax"])
    assert levels > 30  # neither empty nor one colour
    assert parameters["prompt"] == PROMPT

    model = re.sub(r"__init__\.py\s*$", "assets/pixart_tiny", where)
    run(python, "-m", "cnxs_jax.convert", model, "converted", cwd=tmp_path)
    again = [f"--prompt={PROMPT}", "--model=converted", "--out=again.png"]
    run(python, "-m", "cnxs_jax.sample", *again, cwd=tmp_path)
    with Image.open(drawn) as one, Image.open(tmp_path / "again.png") as two:
        assert one.tobytes() == two.tobytes()
    for package in ("torch", "tensorflow", "train", "eval", "configs", "tests"):
        missing = f"import importlib.util as u; assert u.find_spec({package!r}) is None"
        run(python, "-c", missing, cwd=tmp_path)
    record(
        "wheel outside the checkout",
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        megabytes=round(wheel.stat().st_size / 1e6, 1),
        install_seconds=round(install_seconds),
        first_picture_seconds=round(sampled - start),
    )


@pytest.mark.slow
def test_the_demo_outside_the_checkout(installed, tmp_path):
    server = Server(tmp_path, python=installed[0], path=None)
    try:
        form = ["a crab", "", "64 x 64", 2, 0, 0, None, 2]
        status, warnings, pictures, _ = server.ask(form)
    finally:
        server.stop()
    assert (status, warnings) == (200, [])
    (picture,) = pictures
    assert picture["parameters"]["model"] == "pixart_tiny"
    assert picture["src"].startswith("data:image/png;base64,")

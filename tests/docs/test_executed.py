"""Every command and Python block of the documents is run, page by page, in a copy of the checkout.

At the smallest size, or as what `small.plan` puts in its place; `small.NOT_RUN` is not run at all.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.checks import record
from tests.docs import commands, small

ROOT = commands.ROOT
LIMIT = 3600  # seconds of one command: that of controlnet_xs.md trains seven controllers
PAGES = [page for page in commands.DOCUMENTS if commands.steps(page)]
RAY = {  # as much of Ray as the example needs
    "ray/__init__.py": "def init(**_):\n    pass\n",
    "ray/train/__init__.py": "RunConfig = ScalingConfig = dict\n",
    "ray/train/v2/__init__.py": "",
    "ray/train/v2/jax.py": "class JaxTrainer:\n"
    "    def __init__(self, train, train_loop_config, **_):\n"
    "        self.fit = lambda: train(train_loop_config)\n",
}


def test_every_command_has_its_run():
    """A tool or module that `small` does not know fails here, and so does a stale exception."""
    reasons = set()
    for page in PAGES:
        for kind, step in commands.steps(page):
            plan = small.plan(step) if kind == "bash" else None
            reasons |= {plan} if isinstance(plan, str) else set()
    assert reasons == set(small.NOT_RUN.values())


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout, where commands may write, with pictures and small models."""
    files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(files, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    rng = np.random.default_rng(0)
    for n in range(10):
        pixels = rng.integers(0, 256, (40 + 3 * n, 56, 3), np.uint8)
        name = f"{n}" if n else "cat"  # the one that the documents name
        write(tmp_path / "photos" / f"{name}.txt", f"a crab, picture {n}")
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.jpg")
    for name in ("", "mnt/models/"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        tiny = tmp_path / "cnxs_jax" / "assets" / "pixart_tiny"
        (tmp_path / name / "PixArt-XL-2-512x512").symlink_to(tiny)
    for name, text in RAY.items():
        write(tmp_path / "packages" / name, text)
    example = tmp_path / "docs" / "examples" / "ray_train.py"
    example.write_text(example.read_text().replace("xl_512", "smoke").replace("/mnt/", "mnt/"))
    return tmp_path


def prepare(page, checkout):
    """What a page takes from another one, or from the hub."""
    text = page.read_text(encoding="utf-8")
    if "runs/lcm/export" in text and "--workdir=runs/lcm\n" not in text:
        (checkout / "runs" / "lcm").mkdir(parents=True)
        tiny = checkout / "cnxs_jax" / "assets" / "pixart_tiny"
        (checkout / "runs" / "lcm" / "export").symlink_to(tiny)
    if ".pth pixart_512" in text:
        command = ["cnxs_jax/assets/pixart_tiny", "PixArt-XL-2-512x512.pth"]
        command += ["--component=transformer", "--to=official"]
        wait([start([sys.executable, "-m", "cnxs_jax.convert", *command], checkout)])


def start(words, cwd):
    """The process of a command that sees `cwd` as the checkout, and no other."""
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": os.pathsep.join([str(cwd), str(cwd / "packages")]),
        "PATH": path,
        **{f"GIT_{who}_{what}": "a.reader@example.org" for who in ("AUTHOR", "COMMITTER")
           for what in ("NAME", "EMAIL")},
    }  # fmt: skip
    words = ["bash", "-c", '"$@"', "-", *words] if words[0] == "." else words
    found = [sorted(cwd.glob(w)) if re.fullmatch(r"\S+/\S*\*\S*", w) else [w] for w in words]
    return subprocess.Popen(
        [str(word) for some in found for word in some], cwd=cwd, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait(processes):
    """The first one's output; all must end well, and pip must know the extras."""
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        shown = " ".join(process.args[1:])
        assert process.returncode == 0, f"{shown}\n{out[-1500:]}\n{err[-3000:]}"
        assert "does not provide the extra" not in err, f"{shown}\n{err[-1500:]}"
    return outputs[0][0]


def free_port():
    with contextlib.closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(plan, checkout):
    """What a `small.Run` printed."""
    if plan.serves:
        from tests.demo.client import Server

        if importlib.util.find_spec("gradio") is None:
            pytest.skip("pip install -e '.[demo]': the page needs gradio")
        Server(checkout, *plan.words, path=checkout).stop()
        return ""
    port, every = str(free_port()), range(max(plan.hosts, 1))
    filled = [[w.replace("{port}", port).replace("{id}", str(n)) for w in plan.words]
              for n in every]  # fmt: skip
    return wait([start(words, checkout) for words in filled])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_executed(page, checkout):
    begin, ran, text = time.monotonic(), 0, page.read_text(encoding="utf-8")
    prepare(page, checkout)
    for kind, step in commands.steps(page):
        plan = small.plan(step) if kind == "bash" else small.Run([sys.executable, "-c", step])
        if isinstance(plan, str):
            continue
        printed = run(plan, checkout)
        ran += 1
        for line in printed.splitlines():  # a table on a page is what its Python block prints
            assert kind != "python" or not line.startswith("| ") or line in text, line
    name = page.relative_to(ROOT)
    record(f"commands of {name}", run=ran, seconds=round(time.monotonic() - begin))

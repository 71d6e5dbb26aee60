"""Two processes of four devices each, started by `jax.distributed` on loopback."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from cnxs_jax import checkpoint
from tests import checks
from tests.train import small
from train import log, loop

ROOT = pathlib.Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir, port, process_id, *flags, config):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
    cluster = ["--num_processes=2", f"--process_id={process_id}", f"--coordinator=127.0.0.1:{port}"]
    return subprocess.Popen(
        [sys.executable, "-m", "train", f"--config=tests/train/{config}",
         f"--workdir={workdir}", *flags, *cluster],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run_pair(workdir, config, *flags):
    port = free_port()
    pair = [start(workdir, port, i, *flags, config=config) for i in range(2)]
    outputs = [process.communicate(timeout=500)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs


@pytest.mark.slow
def test_a_stage_waits_for_the_export_of_the_one_before(tmp_path):
    """The second stage opens that file in both processes; the lead writes it for 3 seconds.

    Orbax also meets when it opens the next stage's checkpoints; `loop.barrier` does not rely on it
    (tests/train/test_loop.py sees that it is called).
    """
    run_pair(tmp_path, "toy.py:stages")
    assert (tmp_path / "second" / "export" / "params.npz").is_file()


# fsdp: every process has its own part of the batch. tensor: the axis spans both processes, which
# hold the same parts and must feed the same examples.
LAYOUTS = {
    "fsdp": ("--config.mesh.data=2", "--config.mesh.fsdp=4"),
    "tensor": ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
    "tensor over both": ("--config.mesh.data=1", "--config.mesh.tensor=8"),
}


@pytest.fixture(scope="module", params=["denoise", "consistency"])
def one(request, tmp_path_factory):
    """(recipe, directory of its run on one device)"""
    root = tmp_path_factory.mktemp(request.param)
    small.teacher(root)
    config = small.get_config(request.param)
    loop.main(config, root / "one")
    return request.param, root


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:caption has")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_equal_one(one, layout):
    """The DiT's own recipes, 20 steps: loss within 1e-5 relative."""
    recipe, root = one
    workdir = root / layout.replace(" ", "_")
    run_pair(workdir, f"small.py:{recipe}", *LAYOUTS[layout])
    alone, pair = (
        [line["loss"] for line in log.read_metrics(path / "metrics.jsonl")]
        for path in (root / "one", workdir)
    )
    np.testing.assert_allclose(pair, alone, rtol=1e-5)
    assert len(pair) == small.STEPS
    worst = max(abs(a / b - 1) for a, b in zip(pair, alone, strict=True))
    checks.record("two processes of four devices", recipe=recipe, mesh=layout, steps=small.STEPS,
                  worst_relative_loss=worst)  # fmt: skip
    assert checkpoint.saved_steps(workdir / "checkpoints") == [15, 20]
    assert (workdir / "export" / "model_index.json").is_file()

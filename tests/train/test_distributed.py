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
from tests.train import toy
from train import log, loop

ROOT = pathlib.Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir, port, process_id, *flags, variant=""):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
    cluster = ["--num_processes=2", f"--process_id={process_id}", f"--coordinator=127.0.0.1:{port}"]
    return subprocess.Popen(
        [sys.executable, "-m", "train", f"--config=tests/train/toy.py{variant}",
         f"--workdir={workdir}", *flags, *cluster],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run_pair(workdir, *flags, variant=""):
    port = free_port()
    pair = [start(workdir, port, i, *flags, variant=variant) for i in range(2)]
    outputs = [process.communicate(timeout=500)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs


@pytest.mark.slow
def test_a_stage_waits_for_the_export_of_the_one_before(tmp_path):
    """The second stage opens that file in both processes; the lead writes it for 3 seconds.

    Orbax also meets when it opens the next stage's checkpoints; `loop.barrier` does not rely on it
    (tests/train/test_loop.py sees that it is called).
    """
    run_pair(tmp_path, variant=":stages")
    assert (tmp_path / "second" / "export" / "params.npz").is_file()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    loop.main(toy.config(), tmp_path / "one")
    run_pair(tmp_path / "two", "--config.mesh.data=2", "--config.mesh.fsdp=4")
    one, two = (
        [line["loss"] for line in log.read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("one", "two")
    )
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert len(two) == 20
    worst = max(abs(a / b - 1) for a, b in zip(two, one, strict=True))
    checks.record("two processes of four devices", steps=20, worst_relative_loss=worst)
    assert checkpoint.saved_steps(tmp_path / "two" / "checkpoints") == [15, 20]
    assert (tmp_path / "two" / "export" / "params.npz").is_file()

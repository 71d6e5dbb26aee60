"""The loop: resume to the bit, signals, refusals, files. The toy task trains in seconds."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cnxs_jax import checkpoint
from cnxs_jax.errors import CheckpointError, ConfigError, NumericsError
from tests import checks
from tests.train import toy
from train import log, loop

ROOT = pathlib.Path(__file__).parents[2]


def losses(workdir):
    return {line["step"]: line["loss"] for line in log.read_metrics(workdir / "metrics.jsonl")}


def final_prints(workdir):
    """Fingerprints of the newest step as saved."""
    step = checkpoint.saved_steps(workdir / "checkpoints")[-1]
    text = (workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text()
    return step, json.loads(text)["meta"]["fingerprint"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 20 steps on 8 devices."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.main(toy.config(), workdir)
    return workdir


def test_a_run_leaves_its_files(whole):
    names = {p.name for p in whole.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "export"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    lines = log.read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert set(lines[0]) >= {"loss", "grad_norm", "param_norm", "update_norm", "images_per_second"}
    assert json.loads((whole / "config.json").read_text())["steps"] == 20
    assert checkpoint.saved_steps(whole / "checkpoints") == [15, 20]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_resume_is_exact_to_the_bit(whole, tmp_path):
    loop.main(toy.config(steps=7), tmp_path)
    (tmp_path / "export" / "params.npz").unlink()
    (tmp_path / "export").rmdir()
    loop.main(toy.config(), tmp_path, resume=True)
    assert losses(tmp_path) == losses(whole)
    assert final_prints(tmp_path) == final_prints(whole)


def test_resume_on_another_mesh_agrees(whole, tmp_path):
    loop.main(toy.config(steps=10, mesh={"data": 2, "fsdp": 4}, rules=RULES), tmp_path)
    (tmp_path / "export" / "params.npz").unlink()
    (tmp_path / "export").rmdir()
    loop.main(toy.config(), tmp_path, resume=True)
    mine, reference = losses(tmp_path), losses(whole)
    assert mine.keys() == reference.keys()
    np.testing.assert_allclose(list(mine.values()), list(reference.values()), rtol=1e-5)


RULES = ((r"ff/net_0/proj/kernel", (None, "fsdp")),)


def test_a_finished_run_is_left_alone(whole, capsys):
    before = (whole / "metrics.jsonl").read_bytes()
    loop.main(toy.config(), whole, resume=True)
    assert "finished before" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_used_workdir_is_refused(whole):
    with pytest.raises(CheckpointError, match=r"contains steps 15\.\.20") as error:
        loop.main(toy.config(), whole)
    assert error.value.code == 4


def test_resume_with_another_config_is_refused(whole):
    config = toy.config(batch_size=32)
    with pytest.raises(ConfigError, match="batch_size: 16 then, 32 now"):
        loop.main(config, whole, resume=True)


def test_non_finite_step_stops_and_keeps_the_good_state(tmp_path):
    config = toy.config(toy={"width": 32, "bad_step": 8})
    with pytest.raises(NumericsError, match="at step 8"):
        loop.main(config, tmp_path)
    assert checkpoint.saved_steps(tmp_path / "checkpoints") == [5]
    assert max(losses(tmp_path)) == 7


def test_an_indivisible_batch_is_refused_before_building(tmp_path):
    with pytest.raises(ConfigError, match="8 and 16"):
        loop.main(toy.config(batch_size=12), tmp_path)


def test_stages_run_in_order_and_see_each_other(tmp_path):
    from ml_collections import ConfigDict

    first, second = toy.config(steps=2, name="first"), toy.config(steps=3, name="{workdir}/first")
    config = ConfigDict({"stages": ("first", "second"), "first": first, "second": second})
    loop.main(config, tmp_path)
    stored = json.loads((tmp_path / "second" / "config.json").read_text())
    assert stored["name"] == f"{tmp_path}/first"
    assert len(losses(tmp_path / "first")) == 2
    assert len(losses(tmp_path / "second")) == 3


# --- other processes -------------------------------------------------------------------------


def start(workdir, *flags, devices=1):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "train", "--config=tests/train/toy.py"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", "--resume", *flags],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition, process, seconds=120):
    """Polls until `condition()`; False if the process ends first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    process.kill()
    raise AssertionError(process.communicate()[0][-2000:])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75(number, tmp_path):
    process = start(tmp_path, "--config.steps=100000", "--config.save_every=100000")
    assert wait_for(lambda: len(losses(tmp_path)) > 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    step = checkpoint.saved_steps(tmp_path / "checkpoints")[-1]
    assert step == max(losses(tmp_path)) > 3
    assert "Traceback" not in output
    assert "--resume" in output
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def reference_run(tmp_path, devices):
    process = start(tmp_path / "reference", "--config.steps=60", devices=devices)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return tmp_path / "reference"


def kill_until_done(workdir, number, rng, devices):
    """Kills the run `number` times at random moments, then lets it finish."""
    for _ in range(number):
        before = max(losses(workdir), default=0)
        process = start(workdir, "--config.steps=60", devices=devices)
        target = rng.randint(0, 12)
        alive = wait_for(lambda t=before + target: max(losses(workdir), default=0) >= t, process)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
        if not alive:
            break
    process = start(workdir, "--config.steps=60", devices=devices)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def check_kills(tmp_path, number, devices):
    reference = reference_run(tmp_path, devices)
    kill_until_done(tmp_path / "killed", number, random.Random(number + devices), devices)
    assert losses(tmp_path / "killed") == losses(reference)
    assert final_prints(tmp_path / "killed") == final_prints(reference)


def test_three_kills_change_nothing(tmp_path):
    check_kills(tmp_path, 3, devices=1)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_twenty_kills_change_nothing(tmp_path, devices):
    for trial in range(4):
        check_kills(tmp_path / str(trial), 5, devices)
    checks.record("SIGKILL and resume", kills=20, devices=devices, differing_losses=0,
                  differing_leaves=0)  # fmt: skip


def test_help_and_mistakes_are_one_message(tmp_path):
    def run(*flags):
        command = [sys.executable, "-m", "train", *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    shown = run("--help")
    assert "--workdir" in shown.stdout
    bad = run("--config=tests/train/toy.py", f"--workdir={tmp_path}", "--config.steps=0")
    assert bad.returncode == 2
    assert bad.stderr.strip().startswith("error: 0 is out of range")
    assert "Traceback" not in bad.stderr
    peer = run("--config=tests/train/toy.py", f"--workdir={tmp_path}", "--num_processes=2")
    assert peer.returncode == 6
    assert "belong together" in peer.stderr


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.typo=3", "the config has no key 'typo'"),
        ("--config.optimizer.learningrate=1", 'Did you mean "learning_rate"'),
        ("--config.steps=many", "invalid literal"),
        ("--nosuch=1", "nosuch"),
        ("--config=configs/nope.py", "configs/nope.py"),
        ("--config=configs/pixart_lcm.py:tny", "unknown variant 'tny', use one of tiny"),
        ("--workdir=", "give a directory"),
    ],
)
def test_mistakes_on_the_command_line_are_one_message(flag, message):
    """Before absl or ml_collections can print a traceback, and with exit code 2."""
    command = [sys.executable, "-m", "train", "--config=tests/train/toy.py", "--workdir=x", flag]
    bad = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert message in bad.stderr
    assert "Traceback" not in bad.stderr

"""The loop: resume to the bit, signals, refusals, files. The toy task trains in seconds."""

import gc
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs.pixart_control
import configs.pixart_lcm
from cnxs_jax import checkpoint, precision, sharding
from cnxs_jax.errors import CheckpointError, ConfigError, NumericsError, Stopped
from tests import checks
from tests.train import toy
from train import log, loop, report

ROOT = pathlib.Path(__file__).parents[2]


def losses(workdir):
    return {line["step"]: line["loss"] for line in log.read_metrics(workdir / "metrics.jsonl")}


def final_prints(workdir):
    """Fingerprints of the newest step as saved."""
    step = checkpoint.saved_steps(workdir / "checkpoints")[-1]
    return step, meta_of(workdir, step)["fingerprint"]


def meta_of(workdir, step):
    text = (workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text()
    return json.loads(text)["meta"]


def exported(workdir):
    with np.load(workdir / "export" / "params.npz") as file:
        return float(file["gain"])


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
    loop.main(toy.config(), tmp_path, resume=True)
    assert losses(tmp_path) == losses(whole)
    assert final_prints(tmp_path) == final_prints(whole)
    assert exported(tmp_path) == exported(whole)  # the export of 7 steps is replaced
    assert not (tmp_path / loop.OLD_EXPORT).exists()


def test_resume_on_another_mesh_agrees(whole, tmp_path):
    loop.main(toy.config(steps=10, mesh={"data": 2, "fsdp": 4}, rules=RULES), tmp_path)
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


def copy_of(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_finished_run_is_not_cut_short(whole):
    with pytest.raises(ConfigError, match="finished after 20 steps, more than steps 10"):
        loop.main(toy.config(steps=10), whole, resume=True)


def test_a_finished_run_without_checkpoints(whole, tmp_path, capsys):
    """It is still finished, still another config's, and cannot go on."""
    workdir = copy_of(whole, tmp_path)
    shutil.rmtree(workdir / "checkpoints")
    loop.main(toy.config(), workdir)
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="seed: 0 then, 1 now"):
        loop.main(toy.config(seed=1), workdir)
    with pytest.raises(CheckpointError, match="no checkpoint to go on from 20 to 30"):
        loop.main(toy.config(steps=30), workdir)
    assert exported(workdir) == exported(whole)


def test_an_extension_that_is_killed_is_not_finished(whole, tmp_path, monkeypatch, capsys):
    """Neither the old export nor the old report passes for those of more steps."""
    workdir = copy_of(whole, tmp_path)
    (workdir / "report.md").write_text("20 steps")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Fit, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.main(toy.config(steps=23), workdir, resume=True)
    assert checkpoint.saved_steps(workdir / "checkpoints")[-1] == 23
    assert not (workdir / "report.md").exists()
    loop.main(toy.config(steps=23), workdir, resume=True)
    assert "finished before" not in capsys.readouterr().out
    assert exported(workdir) != exported(whole)
    assert not (workdir / loop.OLD_EXPORT).exists()


def test_a_checkpoint_of_more_steps_is_refused(whole, tmp_path):
    workdir = copy_of(whole, tmp_path)
    shutil.rmtree(workdir / "export")
    with pytest.raises(ConfigError, match="of step 20, more than steps 12"):
        loop.main(toy.config(steps=12), workdir, resume=True)


def test_auto_precision_is_resolved_once_a_run(tmp_path, monkeypatch):
    """Whatever the clock says when the run goes on."""
    traced, denoise = [], toy.denoise

    def spy(*args):
        traced.append(jax.config.jax_default_matmul_precision)
        return denoise(*args)

    monkeypatch.setattr(toy, "denoise", spy)
    for steps, faster in ((2, True), (4, False)):
        monkeypatch.setattr(precision, "bfloat16_is_faster", lambda faster=faster: faster)
        traced.clear()
        config = toy.config(steps=steps, matmul_precision="auto", mesh={"data": 8})
        loop.main(config, tmp_path, resume=True)
        assert set(traced) == {"bfloat16"}
        assert meta_of(tmp_path, steps)["matmul_precision"] == "bfloat16"


def test_what_is_placed_is_not_kept_a_second_time():
    config = toy.config()
    task = toy.build(config)
    given = {name: jnp.ones(3) for name in ("params", "frozen", "encoders")}
    references = [weakref.ref(x) for x in given.values()]
    task = task._replace(**{name: {"w": x} for name, x in given.items()})
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        fit = loop.Fit(config, task, mesh, pathlib.Path("/"))
    del task, given
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
    np.testing.assert_array_equal(fit.frozen["w"], np.ones(3))
    np.testing.assert_array_equal(fit.encoders["w"], np.ones(3))


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    root = tmp_path_factory.mktemp("staged")
    config = toy.stages()
    config.first.toy.export_seconds = 0.0
    loop.main(config, root)
    return root, config


def test_stages_run_in_order_and_see_each_other(staged):
    """`toy.reads` of the second is the first one's export, found below the workdir."""
    root, _ = staged
    stored = json.loads((root / "second" / "config.json").read_text())
    assert stored["toy"]["reads"] == "{workdir}/first/export/params.npz"
    assert len(losses(root / "first")) == len(losses(root / "second")) == 5


def test_a_moved_workdir_goes_on(staged, tmp_path):
    root, config = staged
    moved = pathlib.Path(shutil.copytree(root, tmp_path / "moved"))
    hidden = root.rename(root.with_name("hidden"))
    try:
        config.second.steps = 7
        loop.main(config, moved, resume=True)
    finally:
        hidden.rename(root)
        config.second.steps = 5
    assert len(losses(moved / "second")) == 7
    assert len(losses(moved / "first")) == 5


def test_a_config_stored_with_its_paths_filled_in_is_the_same(staged, tmp_path):
    """As runs were stored before, in the same place."""
    root, config = staged
    old = loop.plain(loop.expand(config.second, root))
    assert str(root) in old["toy"]["reads"]
    loop.check_same(old, config.second, "config.json", root)
    with pytest.raises(ConfigError, match="toy/reads"):
        loop.check_same(old, config.second, "config.json", tmp_path)


def test_processes_meet_after_every_stage(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop.Fit, "finish", lambda *_: seen.append("export"))
    monkeypatch.setattr(loop, "barrier", seen.append)
    config = toy.stages()
    del config.second.toy.reads
    loop.main(config, tmp_path)
    met = [("export", f"finished {name}", f"report of {name}") for name in ("first", "second")]
    assert seen == [*met[0], *met[1]]


@pytest.fixture
def not_run(monkeypatch):
    """What a run raises in place of training."""

    class StartedError(Exception):
        pass

    def start(*_):
        raise StartedError

    monkeypatch.setattr(loop, "run", start)
    return StartedError


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("source", "shapes", "the scene checker reads emoji_scenes, not shapes"),
        ("size", 32, "the scene checker reads 64 px, not 32"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_before_training(
    key, value, message, tmp_path, not_run
):
    config = configs.pixart_lcm.get_config()
    config.data[key] = value
    with pytest.raises(ConfigError, match=message) as error:
        loop.main(config, tmp_path)
    assert error.value.where == f"config.data.{key}"
    assert "--config.report.num_prompts=0" in error.value.fix
    config.report.num_prompts = 0
    with pytest.raises(not_run):
        loop.main(config, tmp_path)


def test_a_report_of_too_few_pictures_is_refused_before_training(tmp_path, not_run):
    config = configs.pixart_lcm.get_config()
    config.report.num_prompts = 2
    with pytest.raises(ConfigError, match="'kid' needs 3 pictures or more, got 2") as error:
        loop.main(config, tmp_path)
    assert error.value.where == "config.report"
    config.report.metrics = ("agreement",)
    with pytest.raises(not_run):
        loop.main(config, tmp_path)


def test_a_run_on_ones_own_pictures_has_no_report(tmp_path, not_run):
    """Only scenes have a truth to compare with; nothing needs to be said."""
    config = configs.pixart_lcm.get_config()
    config.data.source, config.data.root = "image_folder", str(tmp_path)
    assert not report.wanted(config)
    with pytest.raises(not_run):
        loop.main(config, tmp_path / "run")


def test_a_controller_is_not_compared_with_a_teacher(tmp_path, not_run):
    config = configs.pixart_control.get_config()
    config.report.update(configs.pixart_lcm.get_config().report)
    with pytest.raises(ConfigError, match="no reference_steps.*config.report.reference_steps"):
        loop.main(config, tmp_path)


# --- other processes -------------------------------------------------------------------------


def start(workdir, *flags, devices=1, config="toy.py"):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "train", f"--config=tests/train/{config}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", "--resume", *flags],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition, process, seconds=300):
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


SHARDED = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")


def start_dit(workdir, devices):
    """The recipe of the teacher at its smallest: DiT and T5, their moments and EMA in Orbax."""
    flags = SHARDED if devices == 8 else ()
    return start(workdir, "--config.steps=60", *flags, devices=devices, config="small.py:denoise")


def finish(workdir, devices):
    process = start_dit(workdir, devices)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output


def kill_until_done(workdir, number, rng, devices):
    """Kills the run `number` times at random moments, then lets it finish."""
    for _ in range(number):
        before = max(losses(workdir), default=0)
        process = start_dit(workdir, devices)
        target = rng.randint(0, 12)
        alive = wait_for(lambda t=before + target: max(losses(workdir), default=0) >= t, process)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
        if not alive:
            break
    finish(workdir, devices)


def check_kills(tmp_path, number, devices):
    reference = tmp_path / "reference"
    finish(reference, devices)
    kill_until_done(tmp_path / "killed", number, random.Random(number + devices), devices)
    assert losses(tmp_path / "killed") == losses(reference)
    assert final_prints(tmp_path / "killed") == final_prints(reference)


def test_a_kill_changes_nothing(tmp_path):
    check_kills(tmp_path, 1, devices=1)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_twenty_kills_change_nothing(tmp_path, devices):
    for trial in range(4):
        check_kills(tmp_path / str(trial), 5, devices)
    checks.record("SIGKILL and resume", kills=20, devices=devices, differing_losses=0,
                  differing_leaves=0)  # fmt: skip


def test_a_signal_during_the_export_stops_before_the_next_stage(tmp_path, monkeypatch):
    finish = loop.Fit.finish

    def interrupted(self, *args):
        finish(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    config = toy.stages()
    first, second = config.stages
    with monkeypatch.context() as patch:
        patch.setattr(loop.Fit, "finish", interrupted)
        with pytest.raises(Stopped, match=f"{first} is finished"):
            loop.main(config, tmp_path)
    assert (tmp_path / first / "export").is_dir()
    assert not (tmp_path / second).exists()
    loop.main(config, tmp_path, resume=True)
    assert (tmp_path / second / "export").is_dir()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_whose_every_step_was_damaged_is_not_begun_anew(resume, tmp_path):
    """The first start says so; the next one must not take the directory for a new one."""
    (tmp_path / "checkpoints" / "20.corrupt").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="was damaged and set aside"):
        loop.main(toy.config(), tmp_path, resume)
    assert not (tmp_path / "metrics.jsonl").exists()


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
        ("--config=configs/pixart_lmc.py", 'Did you mean "pixart_lcm.py"'),
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

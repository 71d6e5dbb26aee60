"""A whole sweep of a tiny pipeline: its report, going on, and what is refused."""

import json

import numpy as np
import pytest

from cnxs_jax.errors import CheckpointError, ConfigError, DataError
from cnxs_jax.pipelines.pipeline import save_pipeline
from eval import plan, run
from tests.pipelines import tiny


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    save_pipeline(tiny.pipeline(root / "tokenizer"), root / "pipe")
    (root / "prompts.txt").write_text("a red fox\n\ntwo blue cats\na boat\n")
    return root


def test_a_sweep_from_a_directory(places, tmp_path, monkeypatch):
    given = {"prompts": str(places / "prompts.txt"), "metrics": ("ssim", "psnr"), "batch_size": 8}
    sweep = [plan.parse_sweep("guidance_scale=1,3")]

    def evaluated(**changes):
        options = run.Options(**given | changes)
        return run.pipeline(places / "pipe", tmp_path, options, sweep, steps=2)

    made = evaluated()
    content = json.loads((tmp_path / "report.json").read_text())
    first, second = content["rows"]
    assert (first["guidance_scale"], first["evaluations"]) == (1, 2)
    assert (second["guidance_scale"], second["evaluations"]) == (3, 4)
    assert first["ssim"]["value"] == pytest.approx(1)  # the first row is the reference
    assert first["psnr"] == {"value": None, "n": 3}  # of identical pictures: infinite
    assert second["ssim"]["value"] < 1
    assert second["psnr"]["low"] <= second["psnr"]["value"] <= second["psnr"]["high"]
    assert second["psnr"]["n"] == 3
    text = made.read_text()
    assert text.index("pictures/samples.png") < text.index("| method |")
    assert (tmp_path / "pictures" / "quality.png").is_file()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / run.ROWS).rglob("*.png")}
    assert len(before) == 2 * 3

    monkeypatch.setattr(run.draw, "pipeline_generator", lambda *args: None)  # cannot draw
    evaluated()
    assert {p: p.stat().st_mtime_ns for p in before} == before
    with pytest.raises(ConfigError, match="seed was"):
        evaluated(seed=1)


def test_what_cannot_be_evaluated(places, tmp_path):
    given = {"prompts": str(places / "prompts.txt")}
    with pytest.raises(CheckpointError, match="model_index"):
        run.pipeline(places, tmp_path, run.Options(**given))
    with pytest.raises(ConfigError, match="nothing to compare with"):
        run.pipeline(places / "pipe", tmp_path, run.Options(**given), steps=1)
    options = run.Options(**given, metrics=("scene_accuracy",))
    with pytest.raises(ConfigError, match="scene_accuracy.*needs scenes"):
        run.pipeline(places / "pipe", tmp_path, options, steps=1)
    with pytest.raises(ConfigError, match="no such file or folder"):
        run.pipeline(places / "pipe", tmp_path, run.Options(prompts="absent.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="no prompts"):
        run.pipeline(places / "pipe", tmp_path, run.Options(prompts=str(tmp_path / "empty.txt")))
    options = run.Options(metrics=("agreement",), num_prompts=2, num_real=2)
    with pytest.raises(ConfigError, match="draws 16 x 16 pixels, the scenes have 64 x 64"):
        run.pipeline(places / "pipe", tmp_path, options, steps=1)
    assert not np.any([p.name == "report.md" for p in tmp_path.iterdir()])

"""What the evaluation takes from a run's config: directories, and the scenes of its data."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

import cnxs_jax
from cnxs_jax.errors import CheckpointError, ConfigError
from configs import pixart, pixart_lcm
from eval import measures, recipe, run
from eval.metrics import scene_accuracy

DISTILS = ConfigDict({"teacher_path": "{workdir}/t"})
STAGED = {"stages": ("one", "two"), "one": {}}


def test_where_teacher_and_student_are(tmp_path):
    export = str(tmp_path / "export")
    assert recipe.directories({}, tmp_path) == {"teacher": export}
    found = recipe.directories(DISTILS, tmp_path)
    assert found == {"teacher": f"{tmp_path}/t", "student": export}
    assert recipe.directories({}, tmp_path, "a", "b") == {"teacher": "a", "student": "b"}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, None),
        ({"objective": {"prediction": "epsilon"}}, None),
        ({"objective": {"omega": 2.0}}, 3.0),
        ({"objective": {"omega": None, "omega_range": (1.0, 5.0)}}, 4.0),
        ({"objective": {"omega_range": (1.0, 5.0)}, "guidance_scale": 3.0}, 3.0),
    ],
)
def test_the_scale_that_a_student_learned(config, scale):
    assert recipe.trained_scale(ConfigDict(config)) == scale


def test_another_teacher_keeps_the_student(tmp_path):
    student = {"student": str(tmp_path / "export")}
    assert recipe.directories(DISTILS, tmp_path, "a") == {"teacher": "a"} | student
    assert recipe.directories(DISTILS, tmp_path, "a", "b") == {"teacher": "a", "student": "b"}
    assert recipe.directories({}, tmp_path, "a") == {"teacher": "a"}


def test_the_last_stage_is_the_result(tmp_path):
    config = pixart.get_config()
    assert recipe.directories(config, tmp_path) == {"teacher": str(tmp_path / "layout/export")}
    stage, place = recipe.last_stage(config, tmp_path)
    assert (stage.name, place) == ("layout", tmp_path / "layout")
    with pytest.raises(CheckpointError, match="layout/export"):
        run.main(config, tmp_path)
    staged = ConfigDict(STAGED | {"two": DISTILS})
    found = recipe.directories(staged, tmp_path)
    assert found == {"teacher": f"{tmp_path}/t", "student": str(tmp_path / "two/export")}
    for broken in (ConfigDict(STAGED), {"stages": ()}):
        with pytest.raises(ConfigError, match="stages"):
            recipe.directories(broken, tmp_path)


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"source": "image_folder", "root": "photos"}, "source"),
        ({"source": "shapes", "size": 32}, "source"),
        ({"source": "shapes", "size": 64}, "source"),
        ({"source": "emoji_scenes", "size": 32}, "size"),
        ({"source": "emoji_scenes", "size": 64, "num_concepts": 40}, "num_concepts"),
    ],
    ids=str,
)
def test_scenes_that_the_checker_cannot_read_are_refused_first(tmp_path, data, key):
    config = ConfigDict({"data": data})
    for metrics in (["agreement"], measures.USUAL):
        with pytest.raises(ConfigError) as caught:
            run.main(config, tmp_path, metrics=metrics)
        assert caught.value.where == f"config.data.{key}"
        hint = "no metric works" if data["source"] == "image_folder" else "--metrics=kid"
        assert hint in caught.value.fix
    if data["source"] != "image_folder":
        world, size = recipe.scenes_of(config, ["kid"])
        assert (world.name, size) == (data["source"], data["size"])
        assert len(world.concepts) == data.get("num_concepts", len(world.concepts))


def test_the_shipped_recipes_are_what_the_checker_reads():
    for config in (pixart.get_config().teacher, pixart_lcm.get_config()):
        world, size = recipe.scenes_of(config, measures.USUAL)
        assert (world.name, len(world.concepts), size) == ("emoji_scenes", 32, scene_accuracy.SIZE)
    assert recipe.scenes_of({}, measures.USUAL)[1] == scene_accuracy.SIZE


@pytest.mark.parametrize(
    ("data", "metrics"),
    [
        ({"source": "shapes", "size": 48}, ["kid"]),
        ({"source": "emoji_scenes", "size": None, "num_concepts": 12}, measures.USUAL),
    ],
    ids=["shapes", "fewer concepts"],
)
def test_prompts_and_real_scenes_are_the_runs_own(tmp_path, monkeypatch, data, metrics):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model_index.json").write_text(json.dumps({}))

    vae = SimpleNamespace(module=None, params=None)
    pipe = SimpleNamespace(components={"vae": vae})

    class MeasuredError(Exception):
        pass

    given = {}

    def evaluate(make, planned, *args):
        given.update(sets=planned.sets, real=planned.real)
        raise MeasuredError

    monkeypatch.setattr(cnxs_jax, "load_pipeline", lambda path, mesh: pipe)
    monkeypatch.setattr(run.draw, "round_trip", lambda *args: None)
    monkeypatch.setattr(run, "evaluate", evaluate)
    monkeypatch.setattr(measures, "check_weights", lambda *args: None)
    with pytest.raises(MeasuredError):
        run.main(ConfigDict({"data": data}), tmp_path, metrics=metrics, num_prompts=8, num_real=4)
    world, size = recipe.scenes_of({"data": data}, metrics)
    shapes = {p.images.shape[1:] for p in given["sets"].values()} | {given["real"].shape[1:]}
    assert shapes == {(size, size, 3)}
    named = {c for p in given["sets"].values() for facts in p.facts for c in facts["concepts"]}
    assert named <= set(world.concepts)
    assert not np.array_equal(given["real"], given["sets"]["test"].images[:4])

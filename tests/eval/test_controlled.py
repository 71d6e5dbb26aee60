"""The evaluation of a controller's run: rows, figures by name, going on, what is refused."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cnxs_jax.control.controlnet_transformer import ControlNetTransformer
from cnxs_jax.convert import families
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import load
from cnxs_jax.pipelines.pipeline import save_pipeline
from configs import controlnet_xs, pixart_control, pixart_lcm
from eval import controlled, measures, plan, recipe
from eval.metrics import features
from tests.pipelines import tiny

METRICS = ("control_edges", "control_masks")
GIVEN = {"metrics": METRICS, "num_prompts": 3, "num_real": 3, "batch_size": 3, "steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, workdir) as a run leaves them."""
    root = tmp_path_factory.mktemp("run")
    save_pipeline(tiny.pipeline(root / "words"), root / "base")
    adapter = ControlNetTransformer(num_layers=1, num_attention_heads=2, attention_head_dim=12)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), families.shapes(adapter)
    )
    load.save_model(adapter, params, root / "run" / "export" / "controlnet")
    config = ConfigDict({
        "task": "train.tasks_control:controller", "base_path": "{workdir}/../base",
        "data": {"source": "emoji_scenes", "size": tiny.SIDE},
    })  # fmt: skip
    return config, root / "run"


def test_the_report_has_the_base_and_the_controller(trained, tmp_path):
    config, workdir = trained
    assert recipe.controller(config, workdir)[1:] == (
        str(workdir / "export/controlnet"),
        "lines",
        None,
    )
    made = controlled.main(config, workdir, out=tmp_path, **GIVEN)
    real, through, base, own = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert (base["method"], own["method"]) == ("base without control", "controller")
    assert base["evaluations"] == own["evaluations"] == 2
    assert real["control_edge_f1@1px"]["value"] == 1 >= through["control_edge_f1@1px"]["value"]
    for row in (real, through, base, own):
        assert {"control_edge_f1@1px", "control_mask_iou"} <= set(row)
        assert 0 <= row["control_mask_iou"]["value"] <= 1
        assert row["control_mask_iou"]["n"] == 3
    assert "exact" in made.read_text()
    drawn = [sorted((tmp_path / "eval_rows").glob(f"{m}*/test/*.png")) for m in ("base", "contr")]
    assert [len(d) for d in drawn] == [3, 3]
    assert any(a.read_bytes() != b.read_bytes() for a, b in zip(*drawn, strict=True))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("eval_rows/**/*.png")}
    controlled.main(config, workdir, out=tmp_path, **GIVEN)  # nothing is drawn again
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_what_needs_a_package_is_not_run_at_the_end_of_a_run(trained, tmp_path, monkeypatch):
    """A run must not fail after its training; who asks for a metric by name is told at once."""
    monkeypatch.setattr(features, "weights_path", lambda: None)
    config, workdir = trained
    given = GIVEN | {"metrics": ("control_masks", "kid"), "out": tmp_path}
    with pytest.raises(ConfigError, match="'kid' needs EfficientNet"):
        controlled.main(config, workdir, **given)
    controlled.main(config, workdir, alone=True, **given)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert all("not run" in row["kid_efflite0"] for row in rows)


def test_the_recipes_report_depth_and_kid():
    """What `python -m eval` measures of a controller unless told, but for what has no truth."""
    for config in (controlnet_xs.get_config(), pixart_control.get_config()):
        assert set(config.report.metrics) == {*measures.CONTROL, "scene_accuracy", "kid"}
        measures.check_needs(config.report.metrics, dict.fromkeys(measures.NEEDS, True))


def test_another_hint_and_missing_controllers_are_refused(trained, tmp_path):
    config, workdir = trained
    with pytest.raises(ConfigError, match="no controller yet"):
        controlled.main(config, tmp_path / "absent" / "run", out=tmp_path, **GIVEN)
    assert recipe.controller(ConfigDict({"task": "train.tasks:distil"}), workdir) is None
    wrong = ConfigDict(config.to_dict() | {"data": {"source": "emoji_scenes", "size": 32}})
    with pytest.raises(ConfigError, match="draws 16 x 16 pixels, the scenes have 32 x 32"):
        controlled.main(wrong, workdir, out=tmp_path, **GIVEN)


def test_a_sweep_has_both_lines():
    found = controlled.rows([plan.parse_sweep("guidance_scale=1,3")], 2, 1.0)
    assert [(r.method, r.guidance_scale) for r in found] == [
        ("base without control", 1), ("base without control", 3), ("controller", 1),
        ("controller", 3),
    ]  # fmt: skip
    assert len({r.slug for r in found}) == 4


def test_the_shipped_recipes_of_controllers_say_what_they_are():
    hints = {"canny": controlnet_xs.get_config(), "lines": pixart_control.get_config()}
    for hint, config in hints.items():
        _, adapter, found, _ = recipe.controller(config, "RUN")
        assert (adapter, found) == ("RUN/export/controlnet", hint)
    assert recipe.controller(pixart_lcm.get_config(), "RUN") is None

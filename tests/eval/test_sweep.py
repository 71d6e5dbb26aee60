"""What `--sweep` and `--weights` read, and what they answer to a mistake."""

import pytest

from cnxs_jax.errors import CheckpointError, ConfigError
from eval import measures, networks, plan


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("guidance_scale=1:4", (1.0, 2.0, 3.0, 4.0)),
        ("guidance_scale=1:2:0.5", (1.0, 1.5, 2.0)),
        ("guidance_scale=0.1:0.3:0.1", (0.1, 0.2, 0.3)),
        ("guidance_scale=0,7.5", (0.0, 7.5)),
        ("steps=1,2,4,8", (1, 2, 4, 8)),
        ("steps=2:6:2", (2, 4, 6)),
        ("scheduler=ddim, dpmpp", ("ddim", "dpmpp")),
    ],
)
def test_sweeps(text, values):
    assert plan.parse_sweep(text) == (text.split("=")[0], values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("guidance=1:8", 'Did you mean "guidance_scale"'),
        ("guidance_scale", "cannot sweep|e.g."),
        ("guidance_scale=", "could not convert"),
        ("guidance_scale=8:1", "going up"),
        ("guidance_scale=1:8:0", "going up"),
        ("guidance_scale=1:inf", "going up"),
        ("guidance_scale=1:2:1e-9", "at most 1000"),
        ("guidance_scale=0:1e308:1e-10", "at most 1000"),
        ("guidance_scale=-1,2", "0 or more"),
        ("guidance_scale=nan", "0 or more"),
        ("guidance_scale=2,2.0", "twice"),
        ("steps=0:3", "positive whole"),
        ("steps=1.5", "positive whole"),
        ("scheduler=dimm", 'Did you mean "ddim"'),
    ],
)
def test_sweeps_that_are_none(text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        plan.parse_sweep(text)
    assert caught.value.code == 2
    assert caught.value.where == "--sweep"


def test_a_key_is_swept_once_and_no_sweep_is_one_row():
    sweep = plan.parse_sweep("steps=1,2")
    with pytest.raises(ConfigError, match="twice"):
        plan.sweep_rows([sweep, sweep], 4, 0.0)
    (row,) = plan.sweep_rows([], 4, 0.0)
    assert (row.steps, row.guided, row.evaluations) == (4, False, 4)


def test_rows_of_two_sweeps_lie_apart():
    sweeps = [plan.parse_sweep("guidance_scale=1:8"), plan.parse_sweep("scheduler=ddim,lcm")]
    rows = plan.sweep_rows(sweeps, 4, 0.0)
    assert len({r.slug for r in rows}) == 16
    assert {r.method for r in rows} == {"pipeline, ddim", "pipeline, lcm"}


def test_guidance_that_is_an_input_costs_no_second_evaluation():
    sweep = [plan.parse_sweep("guidance_scale=1,4")]
    assert [row.evaluations for row in plan.sweep_rows(sweep, 4, 0.0)] == [4, 8]
    rows = plan.sweep_rows(sweep, 4, 0.0, doubled=False)
    assert [row.evaluations for row in rows] == [4, 4]
    assert [row.guidance_scale for row in rows] == [1.0, 4.0]


def test_weights_are_asked_for_by_name(tmp_path):
    assert networks.parse_weights(["clip=a=b", "vgg=c"]) == {"clip": "a=b", "vgg": "c"}
    with pytest.raises(ConfigError, match='Did you mean "inception"'):
        networks.parse_weights(["incepton=x"])
    with pytest.raises(ConfigError, match="name=PATH"):
        networks.parse_weights(["inception"])
    for metric, name in (("fid", "inception"), ("cmmd", "clip"), ("lpips", "vgg")):
        with pytest.raises(ConfigError, match=f"{metric!r} needs") as caught:
            measures.check_weights((metric,), {}, "efflite0")
        assert caught.value.fix == f"--weights {name}=PATH"
    with pytest.raises(ConfigError, match="'kid' needs CLIP"):
        measures.check_weights(("kid",), {}, "clip")
    with pytest.raises(CheckpointError, match="there is no"):
        measures.check_weights(("fid",), {"inception": str(tmp_path / "x")}, "efflite0")
    with pytest.raises(ConfigError, match='Did you mean "inception"'):
        networks.check_features("inceptoin")

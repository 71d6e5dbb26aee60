"""The planner: FLOPs a stage against closed forms at the published sizes, memory at a tiny one."""

import types

import jax
import pytest

import cnxs_jax
from cnxs_jax import backend, sharding
from cnxs_jax import tree as trees
from cnxs_jax.models.dit import PixArt
from configs import pixart_control, pixart_lcm
from eval import closed_forms, flops
from tests import checks
from tests.pipelines import tiny
from tests.train.test_control_tasks import control_config, lora_config
from train import abstract, plan

# TFLOP of one picture by PyTorch's FlopCounterMode (PixArt-alpha's modules, diffusers, T5-XXL):
# one evaluation of the DiT, the autoencoder's two ways.
DIT = {256: 0.298, 512: 1.236, 1024: 6.510}
DECODE = {256: 0.622, 512: 2.515, 1024: 10.470}
ENCODE = {256: 0.273, 512: 1.117, 1024: 4.879}
T5, CONTROLLED = 1.117, 9.683
WITHIN = 0.03


def tera(stage):
    return flops.count(stage.lowered) / 1e12


@pytest.mark.parametrize(
    "size", [1024, *(pytest.param(n, marks=pytest.mark.slow) for n in (256, 512))]
)
def test_stages_of_sampling_cost_what_the_closed_forms_say(size):
    config = pixart_lcm.get_config(f"xl_{size}")
    text, loop, decode = abstract.sampling_stages(config, steps=4)
    assert tera(text) == pytest.approx(T5, rel=WITHIN)
    # The loop reads the text once: its embedding, every block's keys and values.
    text_once = 3 * closed_forms.pixart_text(PixArt(), 120) / 1e12
    assert tera(loop) == pytest.approx(4 * DIT[size] - text_once, rel=WITHIN)
    assert tera(decode) == pytest.approx(DECODE[size], rel=WITHIN)
    assert text.weights == pytest.approx(9.52e9, rel=WITHIN)  # bfloat16
    assert loop.weights == pytest.approx(1.22e9, rel=WITHIN)
    assert text.parameters == 4_762_310_656
    assert decode.parameters == 83_653_863


@pytest.mark.slow
def test_a_controlled_loop_costs_half_as_much_again():
    config = pixart_control.get_config("xl_1024")
    picture, _, loop, _ = abstract.sampling_stages(config, steps=4)
    assert tera(picture) == pytest.approx(ENCODE[1024], rel=WITHIN)
    assert tera(loop) == pytest.approx(4 * CONTROLLED, rel=WITHIN)
    assert loop.parameters == 906_266_912


def test_a_step_of_distillation_is_seven_evaluations():
    """Student forward, backward and again for the backward pass, teacher twice, target once."""
    config = pixart_lcm.get_config("xl_512")
    config.batch_size = 1
    encoders, step = abstract.train_stages(config, sharding.make_mesh(devices=jax.devices()[:1]))
    assert tera(step) == pytest.approx(7 * DIT[512], rel=WITHIN)
    assert tera(encoders) == pytest.approx(ENCODE[512] + 2 * T5, rel=WITHIN)  # and the null text
    assert step.parameters == 610_856_096
    five = 5 * 4 * step.parameters  # teacher, student, its average, two moments, and counters
    assert 0 <= step.weights - five < 64


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [pixart_lcm, pixart_control], ids=["plain", "controlled"])
def test_four_steps_at_1024_px_fit_8_gb(recipe):
    """One stage at a time, T5 in int8, the picture decoded in tiles; how near each one comes."""
    config = recipe.get_config("xl_1024")
    args = types.SimpleNamespace(**vars(ARGS) | {"steps": 4})
    costs, text = plan.sampling(config, args)
    peaks = {f"{c.name}, GB": round(c.peak / 1e9, 2) for c in costs}
    checks.record(f"4 steps at 1024 px as compiled for a CPU, {config.name}", **peaks)
    names = ["text encoder, int8", "4 steps", "autoencoder, tiles of 64"]
    assert [c.name for c in costs][-3:] == names
    assert [c.name for c in costs][:-3] == ["control picture"] * (recipe is pixart_control)
    assert all(c.weights <= c.peak <= 8e9 for c in costs)
    assert "fits 8 GB, one stage at a time: yes" in text
    assert "memory as compiled for a CPU" in text


def test_int8_halves_the_text_encoder():
    config = pixart_lcm.get_config("xl_256")
    found = abstract.networks.modules(config, config.teacher_path)
    with backend.assume(backend.ACCELERATOR):
        whole, small = (abstract.text_stage(config, found, mode, 1) for mode in (None, "int8"))
    assert small.weights < 4.92e9 < 0.52 * whole.weights
    assert small.parameters == whole.parameters
    assert tera(small) == pytest.approx(tera(whole))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a tiny random pipeline."""
    path = tmp_path_factory.mktemp("base")
    cnxs_jax.save_pipeline(tiny.pipeline(path / "tokens"), path / "pipeline")
    return path / "pipeline"


ARGS = types.SimpleNamespace(
    what="both", steps=2, guidance=0.0, quantize="int8", vae_tiling=True, batch=1, memory=True,
    device_memory=8.0,
)  # fmt: skip


@pytest.mark.slow
def test_the_report_of_a_directory(base, capsys):
    """Its shapes come from the config files; the weights are never read."""
    for file in base.rglob("*.safetensors"):
        file.write_bytes(b"")
    config = lora_config(base)
    config.mesh = {"data": 8}
    found = plan.report(config, ARGS)
    text = capsys.readouterr().out
    assert "| stage | parameters | weights GB | TFLOP | temp GB (CPU) | peak GB (CPU) |" in text
    assert "fits 8 GB, one stage at a time: yes; the largest is" in text
    assert "mesh: data 8" in text
    sampling, train = found["sampling"], found["train"]
    assert [c["name"] for c in sampling] == [
        "text encoder, int8", "2 steps", "autoencoder, tiles of 64"
    ]  # fmt: skip
    assert [c["name"] for c in train] == ["encoders", "train step"]
    for c in sampling + train:
        assert c["peak"] >= c["temporary"] >= 0
        assert c["flops"] > 0
    assert sampling[1]["peak"] > sampling[1]["weights"]
    assert plan.verdict([abstract.Cost(**c) for c in sampling], 1e-6).count(": no;") == 1


def test_guidance_doubles_a_loop(base):
    config = control_config(base)
    plain, guided = (abstract.sampling_stages(config, 2, scale)[2] for scale in (0.0, 4.5))
    assert plain.name == "2 steps"
    assert flops.count(guided.lowered) == pytest.approx(2 * flops.count(plain.lowered), rel=0.1)


def test_the_forms_of_an_accelerator_are_assumed_inside_only():
    assert backend.current() == "cpu"
    with backend.assume(backend.ACCELERATOR):
        assert backend.current() == "accelerator"
    assert backend.current() == "cpu"


def test_shapes_hold_no_memory(base):
    _, _, shapes = abstract.built(lora_config(base))
    leaves = jax.tree.leaves(shapes)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert trees.size(shapes["state"].params) > 0

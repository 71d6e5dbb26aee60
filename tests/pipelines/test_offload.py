"""Offloading: the same pictures, one network on the device at a time."""

import jax
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax import sharding, tree
from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import control as controls
from cnxs_jax.pipelines import programs
from tests.pipelines import tiny

STAGES = {"encode_picture": controls} | dict.fromkeys(
    ("encode_text", "denoise", "decode"), programs
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored")
    cnxs_jax.save_pipeline(tiny.pipeline(path / "tokenizer"), path / "pipe")
    return path / "pipe"


def draw(pipe, **given):
    prompts = ["a red fox", "two blue cats"]
    return pipe(prompts, num_inference_steps=2, output_type="np", **given).images


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_the_pictures_stay_the_same(stored, mode, dtype):
    whole = draw(cnxs_jax.load_pipeline(stored, dtype=dtype))
    found = draw(cnxs_jax.load_pipeline(stored, dtype=dtype, offload=mode))
    np.testing.assert_allclose(found, whole, atol=1e-6 if dtype == "float32" else 5e-3)


def sizes(params):
    return sorted((v.shape, str(v.dtype)) for v in tree.flatten(params).values() if v.ndim > 1)


def test_only_the_running_network_is_on_the_device(stored, monkeypatch):
    """While a stage runs, no kernel of another network is among the live arrays."""
    controller = jax.device_get(tiny.controller())
    pipe = cnxs_jax.load_pipeline(stored, offload="model", control=controller)
    kernels = {name: sizes(params) for name, (_, params) in pipe.components.items()}
    kernels["control"], seen = sizes(controller[1]), {}

    def watched(name, program):
        def run(module, params, *args, **static):
            live = [(x.shape, str(x.dtype)) for x in jax.live_arrays()]
            seen[name] = {
                other for other, found in kernels.items() if sum(k in live for k in found) > 8
            }
            return program(module, params, *args, **static)

        return run

    before = {id(x) for x in jax.live_arrays()}
    real = jax.live_arrays
    monkeypatch.setattr(jax, "live_arrays", lambda: [x for x in real() if id(x) not in before])
    for name, room in STAGES.items():
        monkeypatch.setattr(room, name, watched(name, getattr(room, name)))
    monkeypatch.setattr("cnxs_jax.pipelines.pixart.encode_text", programs.encode_text)
    draw(pipe, image=np.zeros((tiny.SIDE, tiny.SIDE, 3), np.uint8))
    assert seen == {
        "encode_picture": {"vae"}, "encode_text": {"text_encoder"},
        "denoise": {"transformer", "control"}, "decode": {"vae"},
    }  # fmt: skip
    hosted = pipe.components["vae"].params, pipe.controllers[0].params
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(hosted))
    again = pipe.replace(control=tiny.controller()).controllers[0].params
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(again))


def test_a_streamed_encoder_has_two_blocks_on_the_device(stored, monkeypatch):
    pipe = cnxs_jax.load_pipeline(stored, offload="sequential")
    streamed = pipe.components["text_encoder"].params
    order, real = [], type(streamed).block
    monkeypatch.setattr(type(streamed), "block", lambda self, i: order.append(i) or real(self, i))
    ids = np.array([[3, 4, 1, 0]], np.int32)
    mask = np.array([[1, 1, 1, 0]], np.int32)
    found = streamed.encode(ids, mask)
    module, params = cnxs_jax.load_model(stored, "text_encoder")
    expected = module.apply({"params": params}, ids, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert order == [0, 1]
    with pytest.raises(ConfigError, match="not below vocab_size"):
        streamed.encode(ids + 1000, mask)


def test_int8_and_tiles_draw_nearly_the_same(stored):
    whole = draw(cnxs_jax.load_pipeline(stored))
    small = cnxs_jax.load_pipeline(stored, offload="model", quantize="int8", vae_tiling=True)
    assert small.components["text_encoder"].module.quantization == "int8"
    assert small.vae_tile == 64
    difference = np.abs(draw(small) - whole)
    assert 0 < difference.mean() < 0.02


def test_what_does_not_go_together_is_named(stored, tmp_path):
    with pytest.raises(ConfigError, match='Did you mean "model"'):
        cnxs_jax.load_pipeline(stored, offload="modle")
    with pytest.raises(ConfigError, match="exclude each other"):
        cnxs_jax.load_pipeline(stored, offload="model", mesh=sharding.make_mesh())
    with pytest.raises(ConfigError, match="streamed as the file has them"):
        cnxs_jax.load_pipeline(stored, offload="sequential", quantize="int8")
    streamed = cnxs_jax.load_pipeline(stored, offload="sequential")
    with pytest.raises(ConfigError, match="streamed from a file"):
        cnxs_jax.save_pipeline(streamed, tmp_path / "copy")
    cnxs_jax.save_pipeline(cnxs_jax.load_pipeline(stored, offload="model"), tmp_path / "copy")

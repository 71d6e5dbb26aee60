"""ControlNet-XS in a Stable Diffusion pipeline: its directories, its programs, and what is refused.

`tests/parity/test_xs_pipeline.py` compares the same with diffusers.
"""

import json
import logging
import os
import shutil

import jax
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax.control import controlnet
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import families, files, rules
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.pipelines import programs
from cnxs_jax.pipelines.control import Controller
from cnxs_jax.pipelines.load import save_model
from cnxs_jax.pipelines.stable_diffusion import StableDiffusionPipeline
from tests.convert import crafted
from tests.pipelines import tiny_sd

PICTURE = tiny_sd.ramp()
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """Computed as diffusers computes a fused model, of which the layout has two layers a block."""
    plain = tiny_sd.pipeline(tmp_path_factory.mktemp("sd"), layers_per_block=2)
    controller = tiny_sd.xs_on(plain.components["unet"].module, learn_time_embedding=True)
    return plain.replace(control=Controller(*controller, "diffusers_pretrained"))


@pytest.fixture(scope="module")
def stored(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "pipe"
    cnxs_jax.save_pipeline(pipe, path)
    return path


def _latents(pipe, **kwargs):
    kwargs = {"prompt": "a boat", "image": PICTURE, "num_inference_steps": 2} | kwargs
    return pipe(output_type="latent", **kwargs).images


def _equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_fused_directories_are_written_and_opened(pipe, stored):
    index = json.loads((stored / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionControlNetXSPipeline"
    assert index["unet"] == ["diffusers", "UNetControlNetXSModel"]
    assert index["controlnet"] == ["diffusers", "ControlNetXSAdapter"]
    for opened in (cnxs_jax.load_pipeline(stored), cnxs_jax.load_pipeline(stored, offload="model")):
        for name, component in pipe.components.items():
            assert _equal(component.params, opened.components[name].params)
        assert opened.controllers[0].compat == "diffusers_pretrained"
        assert _equal(pipe.controllers[0].params, opened.controllers[0].params)
        assert opened.components["unet"].module == pipe.components["unet"].module
    taken = cnxs_jax.load_pipeline(stored, control=stored / "unet" / FILE).controllers[0]
    assert taken.compat == "diffusers_pretrained"
    assert _equal(taken.params, pipe.controllers[0].params)


def test_the_fused_controller_goes_before_the_copy_beside_it(pipe, stored, tmp_path):
    """Training with diffusers changes the fused one alone."""
    shutil.copytree(stored, tmp_path / "pipe")
    file = tmp_path / "pipe" / "controlnet" / FILE
    tensors = files.read_tensors(file)
    files.write_safetensors(file, {name: np.zeros_like(t) for name, t in tensors.items()})
    opened = cnxs_jax.load_pipeline(tmp_path / "pipe")
    assert _equal(pipe.controllers[0].params, opened.controllers[0].params)


def test_replacing_a_controller_keeps_whose_computation_it_follows(pipe, stored):
    """Until a `Controller` names another; ControlNet has no choice."""
    opened, own = cnxs_jax.load_pipeline(stored), pipe.controllers[0]
    assert opened.replace(control=own[:2]).controllers[0].compat == "diffusers_pretrained"
    changed = opened.replace(control=stored / "controlnet")
    assert changed.controllers[0].compat == "diffusers_pretrained"
    taken_off = opened.replace(control=[]).replace(scheduler="euler")
    assert taken_off.replace(control=own[:2]).controllers[0].compat == "diffusers_pretrained"
    named = taken_off.replace(control=Controller(*own[:2], "official"))
    assert named.replace(control=own[:2]).controllers[0].compat == "official"
    base = opened.components["unet"]
    copy = controlnet.from_unet(base.module)
    copy = copy, controlnet.copied_params(copy, base.params, jax.random.key(0))
    assert opened.replace(control=copy).controllers[0].compat == "official"
    plain = StableDiffusionPipeline(opened.components, opened.tokenizer, opened.scheduler)
    assert plain.replace(control=own[:2]).controllers[0].compat == "official"


@pytest.mark.slow
@pytest.mark.parametrize("compat", ["official", "diffusers"])
def test_other_computations_are_written_apart(pipe, tmp_path, compat):
    other = pipe.replace(control=Controller(*pipe.controllers[0][:2], compat))
    cnxs_jax.save_pipeline(other, tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert cnxs_jax.load_pipeline(tmp_path / "pipe").controllers[0].compat == compat


def test_what_diffusers_cannot_hold_fused_is_not_written(tmp_path):
    plain = tiny_sd.pipeline(tmp_path)  # one layer a block
    controller = tiny_sd.xs_on(plain.components["unet"].module)
    pipe = plain.replace(control=Controller(*controller, "diffusers_pretrained"))
    with pytest.raises(ConfigError, match="fused model cannot hold layers_per_block = 1"):
        cnxs_jax.save_pipeline(pipe, tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


def compilations(caplog, call):
    """The programs that XLA compiled during `call`, small ones included."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        call()
    messages = [record.getMessage() for record in caplog.records]
    return [text for text in messages if text.startswith("Finished XLA compilation")]


def test_nothing_recompiles(pipe, caplog):
    """Of all programs of a call, not of the loop alone; another number of steps is another loop."""
    one = {"controlnet_conditioning_scale": 0.9, "seed": 1}
    assert compilations(caplog, lambda: _latents(pipe, **one))
    for change in (
        {"controlnet_conditioning_scale": 0.3},
        {"controlnet_conditioning_scale": 0.0},
        {"control_guidance_start": 0.5},
        {"control_guidance_end": 0.5},
        {"seed": 5},
        {"prompt": "two blue cats"},
        {"negative_prompt": "a red fox", "guidance_scale": 3.0},
        {"image": 1 - PICTURE},
        {"image": np.round(255 * PICTURE).astype(np.uint8)},
    ):
        assert not compilations(caplog, lambda change=change: _latents(pipe, **one | change)), (
            change
        )
    assert compilations(caplog, lambda: _latents(pipe, **one | {"num_inference_steps": 3}))


BAD_HINTS = {
    "none": (None, "needs a control picture"),
    "another size": (tiny_sd.ramp(16, 24), "16x24, expected 16x16"),
    "another size than the first": ([PICTURE, tiny_sd.ramp(24, 16)], "24x16, expected 16x16"),
    "one channel": (PICTURE[..., :1], r"RGB image \[H,W,3\], got shape \(16, 16, 1\)"),
    "no channels": (PICTURE[..., 0], r"RGB image \[H,W,3\], got shape \(16, 16\)"),
    "four channels": (np.ones((16, 16, 4), "f4"), r"RGB image \[H,W,3\], got shape \(16, 16, 4\)"),
    "channels first": (PICTURE.transpose(2, 0, 1), r"RGB image \[H,W,3\]"),
    "0 to 255": (255 * PICTURE, r"in \[0,1\].*(?s:.*)divide 0..255 by 255"),
    "-1 to 1": (2 * PICTURE - 1, r"in \[0,1\]"),
    "nan": (PICTURE * np.float32("nan"), r"in \[0,1\]"),
    "integers": (np.ones((16, 16, 3), np.int64), "uint8 or float pixels, got int64"),
    "booleans": (PICTURE > 0.5, "uint8 or float pixels, got bool"),
    "a path": ("hint.png", "image"),
}


@pytest.mark.parametrize("case", BAD_HINTS)
def test_bad_hints_stop_before_any_network_runs(pipe, monkeypatch, case):
    image, message = BAD_HINTS[case]
    for name in ("denoise", "decode", "encode_text"):
        monkeypatch.setattr(programs, name, None)
    several = {"prompt": ["a boat", "a red fox"]} if isinstance(image, list) else {}
    with pytest.raises(ConfigError, match=message) as caught:
        _latents(pipe, image=image, height=16, width=16, **several)
    assert caught.value.where == "image"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cross_attention_dim": 24}, "another base: cross_attention_dim 24, of the base 16"),
        ({"base_block_out_channels": (8, 24)}, r"base_block_out_channels \(8, 24\), of the base"),
        (
            {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")},
            r"another base: down_block_types \('DownBlock2D', 'Cross",
        ),
        ({"transformer_layers_per_block": (1, 2)}, r"transformer_layers_per_block \(1, 2\)"),
        ({"in_channels": 9}, "in_channels 9, of the base 4"),
    ],
)
def test_an_adapter_of_another_base_is_refused(pipe, fields, words):
    other = pipe.controllers[0].module.clone(**fields)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), families.shapes(other))
    with pytest.raises(ConfigError, match=words) as caught:
        pipe.replace(control=(other, params))
    assert "each need their own" in str(caught.value)


def _written(pipe, path, layout, change):
    """The path of the adapter whose tensors, named as in `layout`, are `change`d."""
    module, params, _ = pipe.controllers[0]
    save_model(module, params, path)
    if layout == "official":
        (path / FILE).unlink()
        tensors = layouts.official_tensors(module, params)
        file = path / "adapter.safetensors"
    else:
        tensors, file = rules.to_tensors(params), path / FILE
    files.write_safetensors(file, change(tensors))
    return file if layout == "official" else path


LAYOUTS = {"diffusers": "mid_block.ctrl_to_base.bias", "official": "middle_block_out.0.bias"}
DAMAGES = {
    "missing": (lambda tensors, key: tensors.pop(key), r"missing.*mid_block.ctrl_to_base.bias"),
    "extra": (lambda tensors, key: tensors.update({key + "2": tensors[key]}), "bias2"),
    "another shape": (
        lambda tensors, key: tensors.update({key: np.zeros(3, np.float32)}),
        r"(mid_block.ctrl_to_base|middle_block_out.0).bias: got \(3,\), expected \(16,\)",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", DAMAGES)
def test_files_with_other_tensors_are_refused(pipe, tmp_path, layout, case):
    damage, words = DAMAGES[case]

    def change(tensors):
        damage(tensors, LAYOUTS[layout])
        return tensors

    path = _written(pipe, tmp_path, layout, change)
    with pytest.raises(CheckpointError, match=f"(?s){words}") as caught:
        pipe.replace(control=path)
    assert str(tmp_path) in str(caught.value)
    whole = _written(pipe, tmp_path / "whole", layout, lambda tensors: tensors)
    assert _equal(pipe.replace(control=whole).controllers[0].params, pipe.controllers[0].params)


def _hostile(path):
    crafted.BAD_TORCH["os_system"](path / "adapter.ckpt")
    return path / "adapter.ckpt"


def _hostile_directory(path):
    (path / "config.json").write_text('{"_class_name": "ControlNetXSAdapter"}')
    crafted.BAD_TORCH["os_system"](path / "diffusion_pytorch_model.bin")
    return path


def _with(**contents):
    """A directory of these files."""

    def write(path):
        for name, content in contents.items():
            (path / name.replace("__", ".")).write_bytes(content)
        return path

    return write


CONFIG = b'{"_class_name": "ControlNetXSAdapter"}'
BAD_FILES = {
    "hostile pickle": (_hostile, CheckpointError, "os.system"),
    "hostile pickle in a directory": (_hostile_directory, CheckpointError, "os.system"),
    "nothing": (lambda path: path / "gone", CheckpointError, "no such file or directory"),
    "no config": (_with(readme=b""), ConfigError, "has no config.json"),
    "no weights": (_with(config__json=CONFIG), CheckpointError, "no weights, only config.json"),
    "a page of a web site": (
        _with(config__json=CONFIG, model__safetensors=b"<!DOCTYPE html><html>"),
        CheckpointError,
        "an HTML page",
    ),
    "broken config": (_with(config__json=b"{"), ConfigError, "no JSON"),
    "another class": (
        _with(
            config__json=b'{"_class_name": "T2IAdapter"}',
            model__safetensors=crafted.good_safetensors(),
        ),
        ConfigError,
        "T2IAdapter",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_are_no_adapter_are_refused(pipe, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, kind, words = BAD_FILES[case]
    path = make(tmp_path)
    before = os.listdir(tmp_path)
    with pytest.raises(kind, match=words) as caught:
        pipe.replace(control=path)
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == before  # nothing was executed


def test_other_networks_are_no_controllers(pipe, stored):
    with pytest.raises(ConfigError, match="AutoencoderKL is no controller"):
        pipe.replace(control=stored / "vae")
    with pytest.raises(ConfigError, match=r"(?s)components: controlnet, .*or its directory"):
        pipe.replace(control=stored)

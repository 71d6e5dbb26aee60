"""Several ControlNets in one pipeline directory, as diffusers' `MultiControlNetModel` lies there.

`tests/parity/test_controlnet.py` compares such a directory with diffusers.
"""

import json
import shutil

import jax
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax.control import controlnet
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.pipelines.control import Controller
from tests.pipelines import tiny_sd


def copy_on(base, seed):
    """(module, params) of a ControlNet on a UNet component, noise on every parameter."""
    adapter = controlnet.from_unet(base.module, conditioning_embedding_out_channels=(4, 6))
    fresh = controlnet.copied_params(adapter, base.params, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return adapter, jax.tree.map(lambda p: p + rng.normal(0, 0.1, p.shape).astype("f4"), fresh)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_sd.pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def three(plain):
    return plain.replace(control=[copy_on(plain.components["unet"], seed) for seed in range(3)])


@pytest.fixture(scope="module")
def stored(three, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "pipe"
    cnxs_jax.save_pipeline(three, path)
    return path


def test_all_are_written_and_opened_in_their_order(three, stored):
    index = json.loads((stored / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionControlNetPipeline"
    assert index["controlnet"] == ["diffusers", "MultiControlNetModel"]
    assert {p.name for p in stored.glob("controlnet*")} == {
        "controlnet", "controlnet_1", "controlnet_2",
    }  # fmt: skip
    opened = cnxs_jax.load_pipeline(stored)
    assert len(opened.controllers) == 3
    for one, other in zip(three.controllers, opened.controllers, strict=True):
        assert one.module == other.module
        assert jax.tree.all(jax.tree.map(np.array_equal, one.params, other.params))


def test_one_alone_keeps_the_plain_class(three, tmp_path):
    """And directories that the index does not speak of are not opened, as in diffusers."""
    one = three.replace(control=three.controllers[0])
    cnxs_jax.save_pipeline(one, tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["controlnet"] == ["diffusers", "ControlNetModel"]
    shutil.copytree(tmp_path / "pipe" / "controlnet", tmp_path / "pipe" / "controlnet_1")
    assert len(cnxs_jax.load_pipeline(tmp_path / "pipe").controllers) == 1


def test_a_gap_in_their_numbers_is_told(stored, tmp_path):
    shutil.copytree(stored, tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "controlnet_1")
    with pytest.raises(CheckpointError, match="controlnet_2, but no controlnet_1") as caught:
        cnxs_jax.load_pipeline(tmp_path / "pipe")
    assert str(tmp_path) in str(caught.value)


def test_several_without_a_layout_are_not_written(plain, tmp_path):
    adapters = [Controller(*tiny_sd.xs_on(plain.components["unet"].module))] * 2
    with pytest.raises(ConfigError, match=r"(?s)several ControlNetXSAdapter.*save each"):
        cnxs_jax.save_pipeline(plain.replace(control=adapters), tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()

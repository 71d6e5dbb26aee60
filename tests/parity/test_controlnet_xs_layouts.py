"""ControlNet-XS's files against diffusers' classes: names and shapes of the published sizes."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter, UNetControlNetXSModel

from cnxs_jax import tree
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import controlnet_xs_fused as fused
from cnxs_jax.convert import families, rules, unet
from cnxs_jax.pipelines import load
from tests.parity import xs_models

pytestmark = pytest.mark.parity

BASES = {"sd21_14m": "sd21", "sd15_53m": "sd15", "sdxl_20m": "sdxl", "sdxl_48m": "sdxl"}


def plain(config):
    """A config as JSON has it, without what names the library."""
    kept = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return json.loads(json.dumps(kept))


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", layouts.PUBLISHED)
def test_published_sizes_have_diffusers_tensors(name):
    """The adapter's are ours; those of adapter and base make the fused model's, and no others."""
    config, base_config = layouts.PUBLISHED[name], unet.PUBLISHED[BASES[name]]
    family = families.family_of({"_class_name": "ControlNetXSAdapter"}, "config")
    module, target = families.build(family, config, "config")
    base = families.family_of({"_class_name": "UNet2DConditionModel"}, "config").load()
    joint = fused.join_config(families.config_of(base(**base_config)), families.config_of(module))
    with torch.device("meta"):
        adapter = shapes(ControlNetXSAdapter(**config))
        whole = shapes(UNetControlNetXSModel.from_config(joint))
        alone = shapes(UNet2DConditionModel(**base_config))
    ours = {
        rules.keys_of(path, leaf.shape, layouts.DIFFUSERS)[0]: rules.to_torch_shape(
            path, leaf.shape
        )
        for path, leaf in tree.flatten(target).items()
    }
    assert ours == adapter
    assert fused.split(whole) == {"unet": alone, "controlnet": adapter}
    assert fused.join(alone, adapter) == whole


@pytest.mark.parametrize("name", xs_models.CASES)
def test_fused_files_of_diffusers_open_and_go_back(name, tmp_path):
    base, adapter = xs_models.make(name)
    model = xs_models.fuse(base, adapter, "diffusers")
    model.save_pretrained(tmp_path)
    tensors, configs = {}, {}
    for part, alone in (("unet", base), ("controlnet", adapter)):
        module, params = load.load_model(tmp_path, part)
        tensors[part] = rules.to_tensors(jax.tree.map(np.asarray, params))
        configs[part] = families.config_of(module)
        expected = {key: value.numpy() for key, value in alone.state_dict().items()}
        assert tensors[part].keys() == expected.keys()
        assert all(np.array_equal(tensors[part][key], expected[key]) for key in expected)
        assert module.block_out_channels == tuple(alone.config.block_out_channels)
    back = UNetControlNetXSModel.from_config(fused.join_config(*configs.values()))
    joined = {k: torch.tensor(np.array(v)) for k, v in fused.join(*tensors.values()).items()}
    back.load_state_dict(joined)
    assert plain(back.config) == plain(model.config)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())


def test_saved_by_us_opens_in_diffusers(tmp_path):
    _, adapter = xs_models.make("sdxl")
    adapter.save_pretrained(tmp_path / "theirs")
    load.save_model(*load.load_model(tmp_path / "theirs"), tmp_path / "ours")
    path = tmp_path / "ours"
    back, info = ControlNetXSAdapter.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in adapter.state_dict().items())
    ours = plain(back.config)
    assert {key: ours[key] for key in plain(adapter.config)} == plain(adapter.config)

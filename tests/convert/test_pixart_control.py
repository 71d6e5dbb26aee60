"""ControlNet-Transformer files: the official one with both networks, and the diffusers adapter."""

import json

import jax
import numpy as np
import pytest

from cnxs_jax import control, tree
from cnxs_jax.control.controlnet_transformer import ControlNetTransformer
from cnxs_jax.convert import families, files, pixart_control, rules
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.pipelines import load
from tests.convert.test_rules import PIXART, TINY_PIXART, random_params, target_of

ADAPTER = families.family_of({"_class_name": "PixArtControlNetAdapterModel"}, "test")
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24, "order": "paper"}
TABLES = {"diffusers": pixart_control.DIFFUSERS, "official": pixart_control.OFFICIAL}


@pytest.fixture(scope="module")
def joint():
    """A controlled PixArt and its parameters."""
    base, base_target = families.build(PIXART, TINY_PIXART, "test")
    adapter, target = families.build(ADAPTER, TINY, "test")
    return control.attach(base, random_params(base_target), adapter, random_params(target, 1))


@pytest.mark.parametrize("layout", TABLES)
def test_tables_are_bijections(layout):
    target = target_of(ADAPTER, TINY)
    params = random_params(target)
    tensors = rules.to_tensors(params, TABLES[layout])
    back = rules.to_params(tensors, target, TABLES[layout])
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert sum(t.size for t in tensors.values()) == tree.size(params)


def test_official_names_and_counts():
    """17 tensors a block and two more."""
    keys = rules.to_tensors(random_params(target_of(ADAPTER, TINY)), pixart_control.OFFICIAL)
    assert len(keys) == 17 * 2 + 2
    assert keys["0.before_proj.weight"].shape == (48, 48)
    assert "1.before_proj.weight" not in keys
    assert keys["1.copied_block.attn.qkv.weight"].shape == (144, 48)
    assert keys["0.copied_block.scale_shift_table"].shape == (6, 48)
    assert keys["1.after_proj.bias"].shape == (48,)


def test_published_counts():
    """668 tensors in the file of the 1024-MS model; 906,266,912 parameters."""
    small = {"num_attention_heads": 2, "attention_head_dim": 12}
    config = TINY_PIXART | small | {"num_layers": 28, "cross_attention_dim": 24}
    base, base_target = families.build(PIXART, config | {"sample_size": 128}, "test")
    adapter, target = families.build(ADAPTER, small, "test")
    module, params = control.attach(
        base, random_params(base_target), adapter, random_params(target)
    )
    assert len(load.official_tensors(module, params, np.ones((5, 10), np.float32))) == 668
    whole = families.build(PIXART, {"sample_size": 128}, "test")[1]
    assert tree.size(whole) + tree.size(families.build(ADAPTER, {}, "test")[1]) == 906_266_912


def test_official_file_holds_both(joint, tmp_path):
    module, params = joint
    file = tmp_path / "both.safetensors"
    null = np.ones((5, 10), np.float32)
    load.save_official(module, params, file, null_caption=null)
    tensors = files.read_tensors(file)
    assert "base_model.pos_embed" in tensors
    assert "controlnet.1.copied_block.mlp.fc1.bias" in tensors
    base, base_params = load.load_model(file, "transformer", config=families.config_of(module.base))
    adapter, own = load.load_model(file, "controlnet", config=families.config_of(module.control))
    assert (base, adapter) == (module.base, module.control)
    jax.tree.map(np.testing.assert_array_equal, {"base": base_params, "control": own}, params)
    np.testing.assert_array_equal(load.load_null_caption(file, "transformer"), null)
    with pytest.raises(ConfigError, match="several components: transformer, controlnet"):
        load.load_model(file)


def test_adapter_directory(joint, tmp_path):
    """diffusers' layout: the class name and `num_layers` are in its config.json."""
    module, params = joint
    load.save_model(module.control, params["control"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "PixArtControlNetAdapterModel"
    assert config["num_layers"] == 2
    adapter, own = load.load_model(tmp_path)
    assert adapter == module.control
    jax.tree.map(np.testing.assert_array_equal, own, params["control"])


def test_published_adapters_need_no_more_than_their_depth():
    module, target = families.build(ADAPTER, {"num_layers": 13}, "test")
    assert module == ControlNetTransformer()
    assert tree.size(target) == 294_917_760


def test_strange_tensors_are_named(joint, tmp_path):
    module, params = joint
    tensors = load.official_tensors(module, params)
    file = tmp_path / "strange.safetensors"
    files.write_safetensors(file, {**tensors, "ema.step": np.ones(1, np.float32)})
    with pytest.raises(CheckpointError, match="1 tensors of no component: ema.step"):
        load.load_model(file, "controlnet", config=TINY)
    less = {k: v for k, v in tensors.items() if k != "controlnet.0.before_proj.bias"}
    files.write_safetensors(file, less)
    with pytest.raises(CheckpointError, match=r"controlnet_blocks.0.before_proj.bias"):
        load.load_model(file, "controlnet", config=TINY)


def test_one_network_has_no_components(joint, tmp_path):
    module, params = joint
    file = tmp_path / "base.safetensors"
    load.save_official(module.base, params["base"], file)
    with pytest.raises(ConfigError, match="no component 'controlnet'"):
        load.load_model(file, "controlnet")

"""`load_model` and `save_model` without PyTorch: recognition, choices, and their error messages."""

import json

import jax
import numpy as np
import pytest

from cnxs_jax import tree
from cnxs_jax.convert import families, files, pixart, rules
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.models.dit import PixArt
from cnxs_jax.pipelines import load
from tests.convert.test_rules import PIXART, TINY_PIXART, random_params


@pytest.fixture
def saved(tmp_path):
    """A pipeline directory with one tiny transformer."""
    module, target = families.build(PIXART, TINY_PIXART, "test")
    params = random_params(target)
    caption = np.ones((5, 10), np.float32)
    load.save_model(module, params, tmp_path / "transformer", null_caption=caption)
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    return tmp_path, module, params


def edit(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def test_round_trip_through_a_directory(saved):
    path, module, params = saved
    for source, component in ((path, "transformer"), (path / "transformer", None)):
        again, back = load.load_model(source, component)
        assert again == module
        jax.tree.map(np.testing.assert_array_equal, back, params)
    file = path / "transformer" / "diffusion_pytorch_model.safetensors"
    jax.tree.map(np.testing.assert_array_equal, load.load_model(file)[1], params)
    assert load.load_null_caption(path, "transformer").shape == (5, 10)


def test_unknown_config_keys_are_ignored(saved):
    path, module, _ = saved
    edit(path / "transformer" / "config.json", _diffusers_version="9.9", dropout=0.1)
    assert load.load_model(path, "transformer")[0] == module


def test_config_argument_goes_over_the_file(saved):
    path, _, _ = saved
    module, _ = load.load_model(path / "transformer", config={"sample_size": 16})
    assert (module.sample_size, module.num_layers) == (16, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "PixArtTransformer3DModel"}, 'Did you mean "PixArtTransformer2DModel"'),
        ({"norm_type": "ada_norm_zero"}, "ada_norm_zero"),
        ({"num_layers": "3"}, "num_layers = '3', expected int"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"num_layers": 10**9}, "num_layers = 1000000000"),
        ({"attention_head_dim": 25}, "cross_attention_dim"),
        ({"use_additional_conditions": 3}, "use_additional_conditions = 3, expected bool"),
        ({"patch_size": -2}, "patch_size = -2"),
    ],
)
def test_impossible_configs(saved, changes, words):
    path, _, _ = saved
    edit(path / "transformer" / "config.json", **changes)
    with pytest.raises(ConfigError) as caught:
        load.load_model(path, "transformer")
    assert words in str(caught.value)


def test_the_only_component_of_an_export_needs_no_name(saved, tmp_path):
    path, _, _ = saved
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "controlnet").symlink_to(path / "transformer")
    module, _ = load.load_model(tmp_path / "export")
    assert type(module).__name__ == "PixArt"


def test_choices_are_listed(saved):
    path, _, _ = saved
    with pytest.raises(ConfigError, match="several components: transformer"):
        load.load_model(path)
    with pytest.raises(ConfigError, match='Did you mean "transformer"'):
        load.load_model(path, "transfomer")
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        load.load_model(path, "transformer", dtype="int8")
    with pytest.raises(CheckpointError, match="no such file"):
        load.load_model(path / "nowhere")
    (path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights, only config.json"):
        load.load_model(path, "transformer")


def test_broken_configs(saved):
    path, _, _ = saved
    config = path / "transformer" / "config.json"
    for text in ("{", "[1]", "{" * 100_000, ""):
        config.write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            load.load_model(path, "transformer")


def test_weights_of_another_size_are_refused(saved):
    path, _, _ = saved
    edit(path / "transformer" / "config.json", num_layers=2)
    with pytest.raises(CheckpointError, match="the model has 2 layers"):
        load.load_model(path, "transformer")


def test_file_without_config_demands_one(saved, tmp_path):
    _, module, params = saved
    bare = tmp_path / "bare.safetensors"
    files.write_safetensors(bare, rules.to_tensors(params, pixart.DIFFUSERS))
    with pytest.raises(ConfigError, match="give `config`"):
        load.load_model(bare)
    back = load.load_model(bare, config=families.config_of(module))[1]
    jax.tree.map(np.testing.assert_array_equal, back, params)
    official = tmp_path / "official.safetensors"
    files.write_safetensors(official, rules.to_tensors(params, pixart.OFFICIAL))
    with pytest.raises(CheckpointError, match="no published PixArt"):
        load.load_model(official)
    back = load.load_model(official, config=TINY_PIXART)[1]
    jax.tree.map(np.testing.assert_array_equal, back, params)


def shapes_of_published(tokens, micro):
    """Zero-stride stand-ins for the tensors of a published file."""
    module, target = families.build(PIXART, {"use_additional_conditions": micro}, "XL/2")
    keys = {"x_embedder.proj.weight": (1152, 4, 2, 2), "t_block.1.weight": (6912, 1152)}
    keys["y_embedder.y_proj.fc1.weight"] = (1152, 4096)
    if tokens:
        keys["pos_embed"] = (1, tokens, 1152)
    if micro:
        keys["csize_embedder.mlp.0.weight"] = (384, 256)
    for i in range(28):
        keys[f"blocks.{i}.attn.qkv.weight"] = (3456, 1152)
    assert tree.flatten(target)["transformer_blocks/attn1/to_q/kernel"].shape == (28, 1152, 1152)
    return {k: np.broadcast_to(np.float32(0), shape) for k, shape in keys.items()}


@pytest.mark.parametrize(
    ("tokens", "micro", "sample_size"),
    [(256, False, 32), (1024, False, 64), (4096, True, 128), (None, True, 128)],
)
def test_published_sizes_are_recognised(tokens, micro, sample_size):
    tensors = shapes_of_published(tokens, micro)
    family, table, config = load.recognise(tensors, {}, "PixArt.pth", "PixArt.pth")
    module, _ = families.build(family, config, "PixArt.pth")
    assert table is pixart.OFFICIAL
    assert module == PixArt(sample_size=sample_size, use_additional_conditions=micro)


def test_unrecognisable_size_demands_a_config():
    with pytest.raises(CheckpointError, match="give `config`"):
        load.recognise(shapes_of_published(None, False), {}, "PixArt.pth", "PixArt.pth")


def test_bad_null_caption(saved):
    path, _, _ = saved
    bad = {"null_caption": np.full((5, 10), np.nan, np.float32)}
    files.write_safetensors(path / "transformer" / "null_caption.safetensors", bad)
    with pytest.raises(CheckpointError, match="finite null_caption"):
        load.load_null_caption(path, "transformer")

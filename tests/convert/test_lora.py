"""LoRA files: written and read back, the layouts in circulation, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import lora, tree
from cnxs_jax.convert import files, rules
from cnxs_jax.convert import lora as lora_files
from cnxs_jax.errors import CheckpointError, ConfigError

TABLE = rules.Table(stacked=("blocks",))
SHAPES = {
    "blocks/attn/to_q/kernel": (3, 6, 8),
    "blocks/attn/to_q/bias": (3, 8),
    "blocks/attn/to_out_0/kernel": (3, 8, 6),
    "patch/proj/kernel": (2, 2, 4, 6),
    "proj_out/kernel": (6, 4),
}


@pytest.fixture
def params():
    return tree.unflatten({p: jnp.ones(s) for p, s in SHAPES.items()})


def filled(params, rank=2, alpha=3.0, targets=".*"):
    rng = np.random.default_rng(1)
    fresh = lora.init(params, targets, rank, jax.random.key(0), alpha)
    return tree.map_with_path(
        lambda p, v: v if p.endswith("scale") else jnp.asarray(rng.normal(size=v.shape), v.dtype),
        fresh,
    )


def updates(adapter):
    return {path: np.asarray(lora.delta(parts)) for path, parts in lora.modules(adapter).items()}


def assert_same(one, two, atol=1e-6):
    assert updates(one).keys() == updates(two).keys()
    for path, update in updates(one).items():
        np.testing.assert_allclose(updates(two)[path], update, atol=atol, err_msg=path)


def test_written_and_read_back(params, tmp_path):
    """The directory keeps factors and alpha, the file their product: its alpha is the rank."""
    adapter = filled(params)
    lora_files.save(adapter, tmp_path / "directory", TABLE)
    back = lora_files.load(tmp_path / "directory", params, TABLE)
    jax.tree.map(np.testing.assert_array_equal, back, adapter)
    lora_files.save(adapter, tmp_path / "x.safetensors", TABLE)
    back = lora_files.load(tmp_path / "x.safetensors", params, TABLE)
    assert_same(back, adapter)
    assert set(np.ravel(back["blocks"]["attn"]["to_q"]["scale"])) == {1.0}


def test_names_and_shapes_of_the_file(params, tmp_path):
    lora_files.save(filled(params), tmp_path / "x.safetensors", TABLE)
    tensors = files.read_tensors(tmp_path / "x.safetensors")
    assert tensors["transformer.blocks.2.attn.to_out.0.lora_A.weight"].shape == (2, 8)
    assert tensors["transformer.blocks.2.attn.to_out.0.lora_B.weight"].shape == (6, 2)
    assert tensors["transformer.patch.proj.lora_A.weight"].shape == (2, 4, 2, 2)
    assert tensors["transformer.patch.proj.lora_B.weight"].shape == (6, 2, 1, 1)
    assert len(tensors) == 2 * (3 + 3 + 1 + 1)
    config = json.loads(files.read_metadata(tmp_path / "x.safetensors")["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (2, 2.0)
    assert config["transformer.target_modules"][0] == "blocks.0.attn.to_out.0"


def old_names(tensors, style, alpha):
    """The same adapter in the other layouts in circulation."""
    found = {}
    for key, array in tensors.items():
        name, side = key.removesuffix(".weight").rsplit(".", 1)
        half = {"lora_A": "down", "lora_B": "up"}[side]
        if style == "diffusers":
            found[f"unet.{name}.lora.{half}.weight"] = array
        elif style == "kohya":
            found[f"lora_unet_{name.replace('.', '_')}.lora_{half}.weight"] = array
            found[f"lora_unet_{name.replace('.', '_')}.alpha"] = np.float32(alpha)
        elif style == "peft":
            found[f"base_model.model.{name}.{side}.default.weight"] = array
    return found


@pytest.mark.parametrize(("style", "strength"), [("diffusers", 1.0), ("kohya", 1.5), ("peft", 1.0)])
def test_other_layouts(params, style, strength):
    adapter = filled(params, rank=2, alpha=2 * strength)
    tensors, _ = lora_files.to_tensors(adapter, TABLE)
    assert_same(lora_files.from_tensors(old_names(tensors, style, 3.0), params, TABLE), adapter)


def test_some_layers_with_ranks_and_alphas_of_their_own(params):
    """Missing layers are left alone, small ranks are padded, each has its own alpha."""
    rng = np.random.default_rng(3)

    def pair(layer, rank):
        name = f"transformer.blocks.{layer}.attn.to_q"
        return {
            f"{name}.lora_A.weight": rng.normal(size=(rank, 6)).astype(np.float32),
            f"{name}.lora_B.weight": rng.normal(size=(8, rank)).astype(np.float32),
        }

    tensors = {**pair(0, 1), **pair(2, 4)}
    config = {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"^blocks.2.attn.to_q": 8}}
    adapter = lora_files.from_tensors(tensors, params, TABLE, config)
    update = updates(adapter)["blocks/attn/to_q"]
    for layer, strength in ((0, 2.0), (2, 2.0)):
        a, b = (tensors[f"transformer.blocks.{layer}.attn.to_q.lora_{s}.weight"] for s in "AB")
        np.testing.assert_allclose(update[layer], strength * (b @ a).T, atol=1e-5)
    assert not update[1].any()
    written, config = lora_files.to_tensors(adapter, TABLE)
    assert_same(lora_files.from_tensors(written, params, TABLE, config), adapter, atol=1e-5)


def test_alpha_pattern_and_rslora(params):
    tensors, config = lora_files.to_tensors(filled(params, rank=4, alpha=4.0), TABLE)
    plain = lora.modules(lora_files.from_tensors(tensors, params, TABLE, config))
    changed = {**config, "alpha_pattern": {"attn.to_q": 12}, "use_rslora": True}
    other = lora.modules(lora_files.from_tensors(tensors, params, TABLE, changed))
    for path, factor in (("blocks/attn/to_q", 6.0), ("proj_out", 2.0)):
        expected = {**plain[path], "scale": factor * plain[path]["scale"]}
        jax.tree.map(np.testing.assert_array_equal, other[path], expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"transformer.blocks.0.attn.to_z.lora_A.weight": np.ones((2, 6))}, "to_z"),
        (lambda t: t | {"text_encoder.q.lora_A.weight": np.ones((2, 6))}, "text_encoder.q"),
        (lambda t: t | {"blocks.0.attn.to_q.bias": np.ones(3)}, "blocks.0.attn.to_q.bias"),
        (lambda t: t | {"proj_out.lora_A.weight": np.ones((2, 7), np.float32)}, "(2, 7)"),
        (lambda t: t | {"proj_out.lora_A.weight": np.ones((0, 6), np.float32)}, "(0, 6)"),
        (lambda t: {k: v for k, v in t.items() if k != "proj_out.lora_B.weight"}, "no lora_B"),
        (lambda t: t | {"proj_out.lora_A.weight": np.full((2, 6), np.nan, np.float32)}, "NaN"),
        (lambda t: t | {"proj_out.alpha": np.ones(2, np.float32)}, "expected one number"),
        (lambda t: t | {"transformer.proj_out.lora_A.weight": np.ones((2, 6))}, "for one place"),
        (lambda t: {}, "no LoRA tensors"),
    ],
)
def test_misfits_are_named(params, change, words):
    tensors, _ = lora_files.to_tensors(filled(params), TABLE)
    with pytest.raises(CheckpointError) as caught:
        lora_files.from_tensors(change(tensors), params, TABLE, where="x.safetensors")
    assert words in str(caught.value)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOKR"}, "LOKR"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_alpha": "much"}, "'much'"),
        ({"alpha_pattern": [1]}, "no table"),
        ({"alpha_pattern": {"(a+)+": 1}}, r"(a+)+"),
    ],
)
def test_configs_that_ask_for_more(params, config, words):
    tensors, _ = lora_files.to_tensors(filled(params), TABLE)
    with pytest.raises(CheckpointError) as caught:
        lora_files.from_tensors(tensors, params, TABLE, config)
    assert words in str(caught.value)


def test_directories_without_parts(params, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter_config.json"):
        lora_files.load(tmp_path, params, TABLE)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON table"):
        lora_files.load(tmp_path, params, TABLE)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no adapter_model.safetensors"):
        lora_files.load(tmp_path, params, TABLE)
    with pytest.raises(ConfigError, match="give a .safetensors file or a directory"):
        lora_files.save(filled(params), tmp_path / "x.pth", TABLE)

"""Single files of Stable Diffusion: what they hold at published sizes, and a tiny one and back."""

import jax
import numpy as np
import pytest

from cnxs_jax import tree
from cnxs_jax.convert import __main__ as command
from cnxs_jax.convert import families, files, rules, single_file, unet
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.pipelines import load
from cnxs_jax.pipelines.pipeline import save_pipeline
from cnxs_jax.pipelines.single_file import save_single_file
from tests.pipelines import tiny, tiny_sd

# Tensors of the published files' networks, without what is not read: SDXL's file has 2515, which
# are these, 1680 of the UNet, `position_ids` and `logit_scale`.
COUNTS = {
    "sd15": {"vae": 248, "text_encoder": 196},
    "sd21": {"vae": 248, "text_encoder": 280},
    "sdxl": {"vae": 248, "text_encoder": 196, "text_encoder_2": 389},
    "sdxl_refiner": {"vae": 248, "text_encoder_2": 389},
}
PROBES = {
    "unet": "input_blocks.0.0.weight",
    "vae": "encoder.conv_in.weight",
    "text_encoder": {
        "sd15": "text_model.embeddings.token_embedding.weight",
        "sdxl": "text_model.embeddings.token_embedding.weight",
        "sd21": "token_embedding.weight",
    },
    "text_encoder_2": "token_embedding.weight",
}
WIDTHS = {
    ("sd15", "text_encoder"): (49408, 768), ("sd21", "text_encoder"): (49408, 1024),
    ("sdxl", "text_encoder_2"): (49408, 1280),
}  # fmt: skip
PAIRS = [(kind, name) for kind, parts in single_file.LAYOUTS.items() for name in parts]


def zeros(shape):
    return np.broadcast_to(np.int8(0), shape)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_published_components(kind, name):
    probe = PROBES[name] if isinstance(PROBES[name], str) else PROBES[name][kind]
    _, shapes = single_file._PROBES[name]
    tensors = {single_file.LAYOUTS[kind][name] + probe: zeros(shapes.get(kind, shapes[None]))}
    tensors |= {prefix + "x": zeros((1,)) for prefix in single_file.LAYOUTS[kind].values()}
    assert single_file.kind_of(tensors) == kind
    part = single_file.part_of(tensors, name, kind)
    if name == "unet":  # tests/models/test_unet.py builds it, which takes a while
        assert part.config(kind) is unet.PUBLISHED[kind]
        return
    family = families.family_of({"_class_name": part.class_name}, kind)
    module, target = families.build(family, part.config(kind), kind)
    leaves = {path: zeros(leaf.shape) for path, leaf in tree.flatten(target).items()}
    written = rules.to_tensors(tree.unflatten(leaves), part.table(module))
    assert len(written) == COUNTS[kind][name]
    assert written[probe].shape == part.tensors[probe].shape
    assert WIDTHS.get((kind, name), written[probe].shape) == written[probe].shape


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind: (pipeline, its single file)}."""
    found = {}
    for kind in ("sd15", "sdxl"):
        path = tmp_path_factory.mktemp(kind)
        pipe = tiny_sd.pipeline(path, xl=kind == "sdxl")
        save_single_file(pipe, path / "model.safetensors")
        found[kind] = (pipe, path / "model.safetensors")
    return found


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_round_trip(made, kind):
    pipe, file = made[kind]
    assert single_file.kind_of(files.read_tensors(file)) == kind
    for name, component in pipe.components.items():
        config = families.config_of(component.module)
        module, params = load.load_model(file, name, config=config)
        assert module == component.module
        jax.tree.map(np.testing.assert_array_equal, params, component.params)


def test_what_training_leaves_in_a_file_is_read_past(made, tmp_path):
    pipe, file = made["sd15"]
    tensors = dict(files.read_tensors(file))
    one = np.ones((1,), np.float32)
    rest = ("model_ema.decay", "betas", "first_stage_model.loss.logvar", "scale_factor")
    text = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    again = tmp_path / "again.safetensors"
    files.write_safetensors(again, tensors | {name: one for name in (*rest, text)})
    for name, (module, params) in pipe.components.items():
        back = load.load_model(again, name, config=families.config_of(module))[1]
        jax.tree.map(np.testing.assert_array_equal, back, params)
    strange = tensors | {"first_stage_model.encoder.more": one}
    files.write_safetensors(again, strange)
    vae = families.config_of(pipe.components["vae"].module)
    with pytest.raises(CheckpointError, match=r"1 unknown tensors:\n.*encoder\.more"):
        load.load_model(again, "vae", config=vae)


def test_component_and_config_are_asked_for(made):
    _, file = made["sdxl"]
    with pytest.raises(ConfigError, match="several components: unet, vae, text_encoder, text_en"):
        load.load_model(file)
    with pytest.raises(ConfigError, match="no component 'transformer', there are: unet"):
        load.load_model(file, "transformer")
    with pytest.raises(ConfigError, match=r"no published unet.*\(8, 4, 3, 3\)"):
        load.load_model(file, "unet")
    _, file = made["sd15"]
    with pytest.raises(ConfigError, match="no component 'text_encoder_2'"):
        load.load_model(file, "text_encoder_2")


def test_command_writes_a_single_file(made, tmp_path, capsys):
    pipe, file = made["sd15"]
    save_pipeline(pipe, tmp_path / "pipe")
    out = tmp_path / "out.safetensors"
    assert command.main([str(tmp_path / "pipe"), str(out), "--to=official"]) == 0
    assert out.read_bytes() == file.read_bytes()
    with pytest.raises(ConfigError, match="does not end in .safetensors"):
        command.main([str(tmp_path / "pipe"), str(tmp_path / "out.ckpt"), "--to=official"])
    pixart = tiny.pipeline(tmp_path / "tokens")
    with pytest.raises(ConfigError, match="no single-file layout"):
        save_single_file(pixart, out)

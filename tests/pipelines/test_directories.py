"""Opening and writing pipelines: round trip, damaged directories, the mesh, the sample command."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest

import cnxs_jax
from cnxs_jax import errors, sample, sharding, tree
from cnxs_jax.errors import CheckpointError, CnxsError, ConfigError
from cnxs_jax.pipelines import diffusers_layout, images
from tests.pipelines import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    null = jax.random.normal(jax.random.key(5), (24, 16))
    return tiny.pipeline(tmp_path_factory.mktemp("tokenizer"), null_text=null)


@pytest.fixture(scope="module")
def stored(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "pipe"
    cnxs_jax.save_pipeline(made, path)
    return path


def _np(pipe, prompt="a red fox", **kwargs):
    return pipe(prompt, num_inference_steps=2, output_type="np", **kwargs).images


def test_round_trip_keeps_every_array_and_the_picture(made, stored):
    opened = cnxs_jax.load_pipeline(stored)
    for name, component in made.components.items():
        before, after = tree.flatten(component.params), tree.flatten(opened.components[name].params)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) for key in before)
    np.testing.assert_array_equal(opened.null_text, made.null_text)
    assert opened.scheduler == made.scheduler
    assert opened.max_tokens == 24
    np.testing.assert_array_equal(_np(opened), _np(made))


def test_saving_replaces_a_pipeline_and_nothing_else(made, stored, tmp_path):
    path = tmp_path / "pipe"
    cnxs_jax.save_pipeline(made, path)
    (path / "left.over").write_text("x")
    cnxs_jax.save_pipeline(made.replace(scheduler="lcm"), path)
    assert not (path / "left.over").exists()
    index = json.loads((path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not empty and not a pipeline"):
        cnxs_jax.save_pipeline(made, other)
    assert (other / "thesis.txt").read_text() == "precious"


def test_failed_saving_keeps_the_earlier_pipeline(made, stored, tmp_path, monkeypatch):
    path = tmp_path / "pipe"
    shutil.copytree(stored, path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(diffusers_layout, "save_model", fail)
    with pytest.raises(OSError, match="disk full"):
        cnxs_jax.save_pipeline(made, path)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_scheduler_and_dtype_are_chosen_on_loading(stored):
    pipe = cnxs_jax.load_pipeline(stored, scheduler="lcm", dtype="bfloat16")
    assert pipe.scheduler["_class_name"] == "LCMScheduler"
    assert pipe.components["transformer"].module.dtype == jax.numpy.bfloat16
    assert pipe.components["vae"].module.dtype == jax.numpy.float32
    picture = pipe("a red fox", output_type="np").images
    full = cnxs_jax.load_pipeline(stored, scheduler="lcm")("a red fox", output_type="np").images
    assert 0 < np.abs(picture - full).mean() < 0.05


def test_a_mesh_draws_the_same_pictures(stored):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    split = cnxs_jax.load_pipeline(stored, mesh=mesh)
    kernel = split.components["transformer"].params["transformer_blocks"]["attn1"]["to_q"]["kernel"]
    assert kernel.sharding.spec[-2:] == ("fsdp", "tensor")
    prompts = ["a red fox", "two blue cats", "a boat"]  # three rows on four parts: one is padding
    one = _np(cnxs_jax.load_pipeline(stored), prompts)
    np.testing.assert_allclose(_np(split, prompts), one, atol=1e-5)


def test_weights_go_from_the_host_straight_to_their_shards(stored, monkeypatch):
    """No device ever holds a whole split array, not even for a moment."""
    seen, put = [], sharding.put

    def spy(x, where):
        seen.append(x)
        assert isinstance(x, np.ndarray)
        return put(x, where)

    monkeypatch.setattr(sharding, "put", spy)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    pipe = cnxs_jax.load_pipeline(stored, mesh=mesh)
    leaves = [x for c in pipe.components.values() for x in jax.tree.leaves(c.params)]
    assert len(seen) == len(leaves)
    assert all(x.sharding.mesh == mesh for x in leaves)
    kernel = pipe.components["text_encoder"].params["encoder"]["block"]["layer_1"]
    kernel = kernel["DenseReluDense"]["wo"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 4)  # of [2, 32, 16]


def _edit(path, name, **values):
    content = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps({**content, **values}))


def _cut(path, name):
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NULL = "transformer/null_caption.safetensors"
DAMAGE = {
    "no_index": (lambda p: (p / INDEX).unlink(), 4, "has no model_index.json"),
    "index_html": (lambda p: (p / INDEX).write_text("<html>"), 4, "not a readable JSON"),
    "index_list": (lambda p: (p / INDEX).write_text("[]"), 4, "expected a JSON object"),
    "index_bytes": (lambda p: (p / INDEX).write_bytes(b"\xff\xfe\x00"), 4, "not a readable JSON"),
    "other_class": (lambda p: _edit(p, INDEX, _class_name="FluxPipeline"), 2, "FluxPipeline"),
    "near_class": (
        lambda p: _edit(p, INDEX, _class_name="PixArtAlphaPipelin"),
        2,
        'mean "PixArtAlphaPipeline"',
    ),
    "no_class": (lambda p: (p / INDEX).write_text("{}"), 2, "None"),
    "list_class": (lambda p: _edit(p, INDEX, _class_name=["a"]), 2, "not supported"),
    "no_scheduler": (lambda p: shutil.rmtree(p / "scheduler"), 4, "missing"),
    "scheduler_class": (lambda p: _edit(p, SCHEDULER, _class_name="PNDM"), 2, "PNDM"),
    "scheduler_no_class": (lambda p: (p / SCHEDULER).write_text("{}"), 4, "_class_name"),
    "scheduler_typo": (lambda p: _edit(p, SCHEDULER, beta_strt=1), 2, "beta_start"),
    "scheduler_betas": (lambda p: _edit(p, SCHEDULER, beta_schedule="x"), 2, "beta_schedule"),
    "no_tokenizer": (lambda p: shutil.rmtree(p / "tokenizer"), 3, "tokenizer"),
    "no_vae": (lambda p: shutil.rmtree(p / "vae"), 4, "vae"),
    "no_weights": (lambda p: (p / WEIGHTS).unlink(), 4, "no weights"),
    "cut_weights": (lambda p: _cut(p, WEIGHTS), 4, "diffusion_pytorch_model"),
    "cut_null": (lambda p: _cut(p, NULL), 4, "null_caption"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_directories(stored, tmp_path, name):
    damage, code, message = DAMAGE[name]
    path = tmp_path / "pipe"
    shutil.copytree(stored, path)
    damage(path)
    with pytest.raises(CnxsError) as caught:
        cnxs_jax.load_pipeline(path)
    assert caught.value.code == code
    assert message in str(caught.value)


def test_null_caption_of_another_width(made, tmp_path):
    wrong = dataclasses.replace(made, null_text=jax.numpy.zeros((24, 8)))
    cnxs_jax.save_pipeline(wrong, tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"\[24, 8\].*\[L,16\]"):
        cnxs_jax.load_pipeline(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"dtype": "float16"}, "dtype"),
        ({"dtype": "bf16"}, "dtype"),
        ({"scheduler": "dpmp"}, "scheduler"),
        ({"control": 3}, "control"),
        ({"lora": 3}, "lora"),
        ({"experts": [{"below": 200}]}, "experts"),
    ],
)
def test_bad_arguments_of_load_stop_before_weights(stored, monkeypatch, arguments, where):
    monkeypatch.setattr(diffusers_layout, "read_model", None)
    with pytest.raises(ConfigError) as caught:
        cnxs_jax.load_pipeline(stored, **arguments)
    assert caught.value.where == where


@pytest.mark.parametrize("path", ["/no/such/place", "./nowhere", "nowhere", "a/b/c", ""])
def test_missing_directory(path):
    with pytest.raises(CnxsError):
        cnxs_jax.load_pipeline(path)


def test_a_file_is_not_taken_for_a_missing_directory(tmp_path):
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="got the file .*one.safetensors.*\n.*model_index"):
        cnxs_jax.load_pipeline(tmp_path / "one.safetensors")


def test_hub_id_offline_names_file_and_recipe(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        cnxs_jax.load_pipeline("nobody/nothing-of-this-name")
    message = str(caught.value)
    assert "model_index.json" in message
    assert "HF_HUB_OFFLINE" in message
    assert "hf download nobody/nothing-of-this-name --local-dir DIR" in message
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="huggingface_hub is not installed"):
        cnxs_jax.load_pipeline("nobody/nothing-of-this-name")


def test_sample_command_draws_and_remembers(stored, tmp_path, capsys):
    out = tmp_path / "x.png"
    arguments = [f"--model={stored}", "--prompt=a red fox", "--seed=3", "--steps=2"]
    assert sample.main([*arguments, f"--out={out}", "--num_images=2"]) == 0
    paths = [tmp_path / "x_0.png", tmp_path / "x_1.png"]
    assert capsys.readouterr().out.split() == [str(p) for p in paths]
    stored_parameters = images.read_parameters(paths[1])
    wanted = {"prompt": "a red fox", "seed": 3, "index": 1, "steps": 2, "guidance": 4.5}
    wanted |= {"model": str(stored), "version": cnxs_jax.__version__, "height": 16, "width": 16}
    assert wanted.items() <= stored_parameters.items()
    assert sample.main([*arguments, f"--out={out}"]) == 0
    assert out.read_bytes() == paths[0].read_bytes()


@pytest.mark.parametrize(
    ("change", "code"),
    [("--height=17", 2), ("--scheduler=ddmp", 2), ("--dtype=fp16", 2), ("--model=/no/model", 4)],
)
def test_sample_command_exit_codes(stored, tmp_path, capsys, change, code):
    arguments = [f"--model={stored}", "--prompt=a", f"--out={tmp_path / 'x.png'}", change]
    with pytest.raises(SystemExit) as caught:
        errors.run_main(sample.main, arguments)
    assert caught.value.code == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("error: ") == 1
    assert not (tmp_path / "x.png").exists()

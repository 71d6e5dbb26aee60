"""Directories written by diffusers and transformers: opened, compared, written back, reopened."""

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from cnxs_jax import tree
from cnxs_jax.convert import files
from cnxs_jax.convert.__main__ import main
from cnxs_jax.errors import CheckpointError
from cnxs_jax.pipelines import load

pytestmark = pytest.mark.parity


def perturbed(model, seed=0):
    """Random weights everywhere: freshly made models have zero layers that hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make_pixart(micro=True):
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=3,
        cross_attention_dim=48,
        caption_channels=10,
        sample_size=8,
        use_additional_conditions=micro,
    )


def make_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def make_t5():
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=20,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=3,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def close(ours, theirs):
    """Relative to the largest value."""
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def compare_pixart(module, params, model):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    text = rng.standard_normal((2, 5, 10)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1] * 5])
    size, aspect = np.array([[64.0, 64], [96, 48]], np.float32), np.array([[1.0], [2]], np.float32)
    cond = {"text": text, "text_mask": mask, "size": size, "aspect": aspect}
    out = jax.jit(module.apply)({"params": params}, x, np.array([3, 999]), cond)
    micro = module.micro_conditioning
    theirs = model(
        torch.tensor(x).permute(0, 3, 1, 2),
        torch.tensor(text),
        torch.tensor([3, 999]),
        added_cond_kwargs={
            "resolution": torch.tensor(size) if micro else None,
            "aspect_ratio": torch.tensor(aspect) if micro else None,
        },
        encoder_attention_mask=torch.tensor(mask),
    ).sample
    close(out, theirs.permute(0, 2, 3, 1))


def compare_vae(module, params, model):
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    apply = jax.jit(module.apply, static_argnames="method")
    mean, _ = apply({"params": params}, x, method="encode")
    theirs = model.encode(torch.tensor(x).permute(0, 3, 1, 2)).latent_dist.mean
    close(mean, theirs.permute(0, 2, 3, 1))
    image = apply({"params": params}, mean, method="decode")
    close(image, model.decode(theirs).sample.permute(0, 2, 3, 1))


def compare_t5(module, params, model):
    ids, mask = np.array([[3, 4, 5, 1, 0], [7, 8, 1, 9, 1]]), np.array([[1, 1, 1, 1, 0], [1] * 5])
    out = jax.jit(module.apply)({"params": params}, ids, mask)
    theirs = model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    valid = mask[..., None].astype(np.float32)
    close(out * valid, theirs * torch.tensor(valid))


MODELS = {
    "pixart": (make_pixart, compare_pixart),
    "vae": (make_vae, compare_vae),
    "t5": (make_t5, compare_t5),
}


@pytest.mark.parametrize("kind", MODELS)
def test_saved_by_pytorch_computes_the_same(tmp_path, kind):
    make, compare = MODELS[kind]
    model = perturbed(make())
    model.save_pretrained(tmp_path)
    module, params = load.load_model(tmp_path)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))
    with jax.default_matmul_precision("highest"):
        compare(module, params, model)


@pytest.mark.parametrize("kind", MODELS)
def test_shards_and_pickles_hold_the_same_as_safetensors(tmp_path, kind):
    model = perturbed(MODELS[kind][0]())
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(list((tmp_path / "many").glob("*-of-*.safetensors"))) > 1
    stem = "pytorch_model" if kind == "t5" else "diffusion_pytorch_model"
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / f"{stem}.bin")
    config = (tmp_path / "one" / "config.json").read_text()
    (tmp_path / "bin" / "config.json").write_text(config)
    module, params = load.load_model(tmp_path / "one")
    for form in ("many", "bin"):
        again, other = load.load_model(tmp_path / form)
        assert again == module
        jax.tree.map(np.testing.assert_array_equal, other, params)


@pytest.mark.parametrize("kind", MODELS)
def test_saved_by_us_opens_in_pytorch(tmp_path, kind):
    model = perturbed(MODELS[kind][0]())
    model.save_pretrained(tmp_path / "theirs")
    load.save_model(*load.load_model(tmp_path / "theirs"), tmp_path / "ours")
    back, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    for key, value in model.config.to_dict().items() if kind == "t5" else model.config.items():
        if not key.startswith("_") and key not in ("block_types", "transformers_version", "dtype"):
            ours = back.config[key] if kind != "t5" else getattr(back.config, key)
            assert ours == value or list(ours) == list(value), key


def official_layout(state, depth):
    """diffusers names -> PixArt's own, written down a second time and the other way round."""
    emb = "adaln_single.emb."
    pairs = {
        "x_embedder.proj": "pos_embed.proj",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
    }
    for old, new in (("t", "timestep"), ("csize", "resolution"), ("ar", "aspect_ratio")):
        pairs[f"{old}_embedder.mlp.0"] = f"{emb}{new}_embedder.linear_1"
        pairs[f"{old}_embedder.mlp.2"] = f"{emb}{new}_embedder.linear_2"
    out = {"final_layer.scale_shift_table": state["scale_shift_table"]}
    for i in range(depth):
        ours, theirs = f"transformer_blocks.{i}.", f"blocks.{i}."
        pairs[theirs + "attn.proj"] = ours + "attn1.to_out.0"
        pairs[theirs + "cross_attn.q_linear"] = ours + "attn2.to_q"
        pairs[theirs + "cross_attn.proj"] = ours + "attn2.to_out.0"
        pairs[theirs + "mlp.fc1"] = ours + "ff.net.0.proj"
        pairs[theirs + "mlp.fc2"] = ours + "ff.net.2"
        out[theirs + "scale_shift_table"] = state[ours + "scale_shift_table"]
        for p in ("weight", "bias"):
            out[f"{theirs}attn.qkv.{p}"] = torch.cat(
                [state[f"{ours}attn1.to_{x}.{p}"] for x in "qkv"]
            )
            out[f"{theirs}cross_attn.kv_linear.{p}"] = torch.cat(
                [state[f"{ours}attn2.to_{x}.{p}"] for x in "kv"]
            )
    for old, new in pairs.items():
        for p in ("weight", "bias"):
            if f"{new}.{p}" in state:
                out[f"{old}.{p}"] = state[f"{new}.{p}"]
    return out


@pytest.mark.parametrize("micro", [True, False])
def test_official_pth_computes_the_same_as_diffusers(tmp_path, micro):
    model = perturbed(make_pixart(micro))
    state = official_layout(model.state_dict(), 3)
    caption = torch.randn(5, 10)
    whole = {**state, "y_embedder.y_embedding": caption, "pos_embed": torch.zeros(1, 16, 48)}
    ema = {k: torch.nn.Parameter(v + 1) for k, v in state.items()}
    path = tmp_path / "PixArt.pth"
    torch.save({"state_dict": whole, "state_dict_ema": ema, "epoch": 3, "step": 0.5}, path)
    config = dict(model.config)
    module, params = load.load_model(path, config=config)
    with jax.default_matmul_precision("highest"):
        compare_pixart(module, params, model)
    np.testing.assert_array_equal(load.load_null_caption(path), caption)
    _, averaged = load.load_model(path, "state_dict_ema", config=config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 1, atol=1e-6), averaged, params)


def test_command_line_both_ways(tmp_path, capsys):
    model = perturbed(make_pixart())
    state = official_layout(model.state_dict(), 3)
    caption = torch.randn(5, 10)
    source = tmp_path / "tiny.pth"
    torch.save({"state_dict": {**state, "y_embedder.y_embedding": caption}}, source)
    model.save_config(tmp_path / "theirs")
    config = str(tmp_path / "theirs" / "config.json")
    assert main([str(source), str(tmp_path / "dir"), "--to=diffusers", "--config", config]) == 0
    back = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "dir")
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    np.testing.assert_array_equal(load.load_null_caption(tmp_path / "dir"), caption)
    for name in ("again.pth", "again.safetensors"):
        assert main([str(tmp_path / "dir"), str(tmp_path / name), "--to=official"]) == 0
        again = files.read_tensors(tmp_path / name)
        assert set(again) == {*state, "y_embedder.y_embedding", "pos_embed"}
        for key, value in state.items():
            np.testing.assert_array_equal(again[key], value)
    loaded = torch.load(tmp_path / "again.pth", weights_only=True)["state_dict"]
    assert torch.equal(loaded["y_embedder.y_embedding"], caption)
    capsys.readouterr()
    assert main([str(source), "--list"]) == 0
    out = capsys.readouterr().out
    assert "blocks.0.attn.qkv.weight  float32  [144, 48]" in out


def test_bfloat16_export_rounds_to_nearest(tmp_path):
    model = perturbed(make_pixart())
    model.save_pretrained(tmp_path / "theirs")
    module, params = load.load_model(tmp_path / "theirs")
    load.save_model(module, params, tmp_path / "ours", dtype="bfloat16")
    back = diffusers.PixArtTransformer2DModel.from_pretrained(
        tmp_path / "ours", torch_dtype=torch.bfloat16
    )
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value.bfloat16()), key


def test_half_precision_sources_become_float32(tmp_path):
    model = perturbed(make_vae()).half()
    model.save_pretrained(tmp_path, variant="fp16")
    _, params = load.load_model(tmp_path)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    _, params = load.load_model(tmp_path, dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    value = model.state_dict()["decoder.conv_in.bias"].float().bfloat16().float()
    kernel = tree.flatten(params)["decoder/conv_in/bias"]
    np.testing.assert_array_equal(kernel.astype(np.float32), value)


@pytest.mark.parametrize("protocol", [0, 4])
def test_other_pickle_protocols_are_refused(tmp_path, protocol):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(3)}, path, pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match="no state dict needs"):
        files.read_tensors(path)


def test_reader_agrees_with_torch(tmp_path):
    path = tmp_path / "w.pth"
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "transposed": base.transpose(0, 2),
        "slice": base[:, 1:, ::2],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "long": base.long(),
        "bool": base > 3,
        "uint8": base.byte(),
        "parameter": torch.nn.Parameter(base),
    }
    torch.save(torch.nn.ParameterDict({}).state_dict() | tensors, path)
    read = files.read_tensors(path)
    for key, value in torch.load(path, weights_only=True).items():
        theirs = value.detach()
        ours = np.asarray(read[key])
        assert ours.shape == tuple(theirs.shape)
        np.testing.assert_array_equal(ours.astype(np.float64), theirs.double().numpy())

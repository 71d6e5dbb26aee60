"""The UNet against diffusers, float32, every parameter perturbed, norms and biases too."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils

from cnxs_jax import tree
from cnxs_jax.convert import families, rules, unet
from cnxs_jax.pipelines import load
from tests import checks
from tests.parity import full_size
from tests.parity.helpers import convert, nhwc, perturb, relative_error

pytestmark = pytest.mark.parity

TINY = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=12,
    attention_head_dim=2,
)
CONFIGS = {
    "sd15": TINY
    | dict(
        block_out_channels=(8, 16, 24),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
    ),
    "sd21": TINY | dict(use_linear_projection=True, attention_head_dim=(2, 4)),
    "sdxl": TINY
    | dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=10 + 6 * 6,
    ),
    "sdxl_refiner": TINY
    | dict(
        block_out_channels=(8, 12, 16, 16),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        attention_head_dim=(2, 3, 4, 4),
        transformer_layers_per_block=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=10 + 5 * 6,
    ),
    "lcm": TINY | dict(time_cond_proj_dim=14),
}
# Heights and widths: square, not square, and not even divisible by the downsampling.
CASES = [
    ("sd15", (8, 8)),
    ("sd15", (11, 14)),
    ("sd21", (12, 8)),
    ("sdxl", (8, 12)),
    ("sdxl_refiner", (16, 24)),
    ("lcm", (8, 8)),
]


def make(name):
    torch.manual_seed(0)
    return perturb(diffusers.UNet2DConditionModel(**CONFIGS[name]))


def inputs(config, size, seed=0):
    """(x NHWC, t, cond, diffusers' arguments)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    x, t = normal(2, *size, 4), np.array([3, 907])
    cond = {"text": normal(2, 5, 12), "text_mask": np.array([[1, 1, 1, 0, 0], [1] * 5])}
    arguments = {
        "sample": torch.tensor(x).permute(0, 3, 1, 2),
        "timestep": torch.tensor(t),
        "encoder_hidden_states": torch.tensor(cond["text"]),
        "encoder_attention_mask": torch.tensor(cond["text_mask"]),
    }
    if "addition_embed_type" in config:
        ids = (config["projection_class_embeddings_input_dim"] - 10) // 6
        cond |= {"pooled": normal(2, 10), "time_ids": rng.integers(0, 1024, (2, ids)).astype("f4")}
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        arguments["added_cond_kwargs"] = {k: torch.tensor(v) for k, v in added.items()}
    if "time_cond_proj_dim" in config:
        cond["guidance"] = np.array([4.5, 7.0], np.float32)
        arguments["timestep_cond"] = guidance_embedding(cond["guidance"], 14)
    return x, t, cond, arguments


def guidance_embedding(omega, dim):
    """As diffusers' own latent consistency pipeline computes it."""
    pipeline = diffusers.LatentConsistencyModelPipeline
    embed = pipeline.get_guidance_scale_embedding
    return embed(None, torch.tensor(omega), embedding_dim=dim)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{name: (PyTorch model, module, params, directory)}, each opened from diffusers' files."""
    found = {}

    def get(name):
        if name not in found:
            path, model = tmp_path_factory.mktemp(name), make(name)
            model.save_pretrained(path)
            found[name] = (model, *load.load_model(path), path)
        return found[name]

    return get


@pytest.mark.parametrize(("name", "size"), CASES)
def test_forward(pairs, name, size):
    model, module, params, _ = pairs(name)
    x, t, cond, arguments = inputs(CONFIGS[name], size)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        expected = nhwc(model(**arguments).sample)
        out = jax.jit(module.apply)({"params": params}, x, t, cond)
    assert relative_error(out, expected) <= 1e-5


def test_gradients(pairs):
    model, module, params, _ = pairs("sdxl")
    x, t, cond, arguments = inputs(CONFIGS["sdxl"], (8, 8))
    model.zero_grad()
    model(**arguments).sample.square().mean().backward()
    expected = tree.flatten(convert({k: p.grad for k, p in model.named_parameters()}))

    def loss(params):
        return jnp.square(module.apply({"params": params}, x, t, cond)).mean()

    with jax.default_matmul_precision("highest"):
        grads = tree.flatten(jax.jit(jax.grad(loss))(params))
    assert grads.keys() == expected.keys()
    largest = max(np.abs(g).max() for g in expected.values())
    for name, g in expected.items():
        assert np.abs(grads[name] - g).max() <= 1e-4 * max(np.abs(g).max(), 1e-3 * largest), name


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_by_us_opens_in_diffusers(pairs, tmp_path, name):
    model, module, params, path = pairs(name)
    load.save_model(module, params, tmp_path)
    back, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs, ours = model.state_dict(), back.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    before, after = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path))
    same = [k for k in before if k not in ("_diffusers_version", "_name_or_path", "dropout")]
    same.remove("addition_embed_type_num_heads")  # of "text" embeddings, which are refused
    assert {k: after.get(k) for k in same} == {k: before[k] for k in same}


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_ldm_names_are_those_that_diffusers_reads(pairs, name):
    model, module, params, _ = pairs(name)
    table = unet.ldm(module, unet.LDM_PREFIX)
    tensors = rules.to_tensors(params, table)
    theirs = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    config = {"layers_per_block": module.layers_per_block} | CONFIGS[name]
    back = single_file_utils.convert_ldm_unet_checkpoint(theirs, config)
    expected = model.state_dict()
    assert back.keys() == expected.keys()
    assert len(tensors) == len(expected)
    assert all(torch.equal(back[key], value) for key, value in expected.items())
    again = rules.to_params(tensors, params, table)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", [*unet.PUBLISHED, "lcm_sd15"])
def test_published_sizes_have_diffusers_tensors(name):
    config = unet.PUBLISHED.get(name) or unet.PUBLISHED["sd15"] | {"time_cond_proj_dim": 256}
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    family = families.family_of({"_class_name": "UNet2DConditionModel"}, "config")
    _, target = families.build(family, config, "config")
    ours = {
        rules.keys_of(path, leaf.shape, unet.DIFFUSERS)[0]: rules.to_torch_shape(path, leaf.shape)
        for path, leaf in tree.flatten(target).items()
    }
    assert ours == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_forward_of_published_sizes(name):
    """Weights drawn; a minute or two and 8 GB each."""
    config = unet.PUBLISHED[name]
    x, t, cond, arguments = full_size.inputs(name, full_size.SIZE)
    model = full_size.on_meta(lambda: diffusers.UNet2DConditionModel(**config))
    with torch.no_grad():
        expected = nhwc(model(**arguments).sample).copy()
    tensors = full_size.arrays(model.state_dict())
    module, params = full_size.ours("UNet2DConditionModel", config, tensors)
    del model, tensors
    full_size.free()
    with jax.default_matmul_precision("highest"):
        out = jax.jit(module.apply)({"params": params}, x, t, cond)
    error = relative_error(out, expected)
    print(f"{name}: {error:.2e}")
    checks.record(f"UNet {name} against diffusers", relative_error=error)
    assert error <= 1e-5

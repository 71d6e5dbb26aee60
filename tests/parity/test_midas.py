"""MiDaS's DPT-hybrid against transformers, random weights, by file, in both layouts."""

import re

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from cnxs_jax import tree
from cnxs_jax.convert import midas
from tests import checks
from tests.parity import full_size
from tests.parity.helpers import relative_error

pytestmark = pytest.mark.parity

BACKBONE = dict(
    model_type="bit",
    layer_type="bottleneck",
    global_padding="same",
    embedding_dynamic_padding=True,
    out_features=["stage1", "stage2", "stage3"],
)
TINY = dict(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=96,
    backbone_featmap_shape=[1, 96, 6, 6],
    backbone_out_indices=[0, 1, 1, 3],
    neck_hidden_sizes=[32, 64, 24, 40],
    fusion_hidden_size=16,
    layer_norm_eps=1e-6,
)
TINY_BACKBONE = dict(depths=[1, 2, 3], hidden_sizes=[32, 64, 96], embedding_size=16, num_groups=8)
# As transformers' script of the conversion has them; the rest are the defaults.
PUBLISHED = dict(neck_hidden_sizes=[256, 512, 768, 768], layer_norm_eps=1e-6)
PUBLISHED_BACKBONE = dict(depths=[3, 4, 9], hidden_sizes=[256, 512, 1024])
UNUSED = re.compile(r"dpt\.layernorm\.|neck\.fusion_stage\.layers\.0\.residual_layer1\.")

# From transformers' names to those of the original file, one after another.
ORIGINAL = (
    (r"^dpt\.embeddings\.position_embeddings", "pretrained.model.pos_embed"),
    (r"^dpt\.embeddings\.cls_token", "pretrained.model.cls_token"),
    (r"^dpt\.embeddings\.projection", "pretrained.model.patch_embed.proj"),
    (r"^dpt\.embeddings\.backbone\.bit\.embedder\.convolution", "BACKBONE.stem.conv"),
    (r"^dpt\.embeddings\.backbone\.bit\.embedder\.norm", "BACKBONE.stem.norm"),
    (r"^dpt\.embeddings\.backbone\.bit\.encoder", "BACKBONE"),
    (r"^(BACKBONE\.stages\.\d)\.layers", r"\1.blocks"),
    (r"^BACKBONE", "pretrained.model.patch_embed.backbone"),
    (r"^dpt\.encoder\.layer", "pretrained.model.blocks"),
    (r"^dpt\.layernorm", "pretrained.model.norm"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"^neck\.reassemble_stage\.readout_projects\.2", "pretrained.act_postprocess3.0.project"),
    (r"^neck\.reassemble_stage\.readout_projects\.3", "pretrained.act_postprocess4.0.project"),
    (r"^neck\.reassemble_stage\.layers\.2\.projection", "pretrained.act_postprocess3.3"),
    (r"^neck\.reassemble_stage\.layers\.3\.projection", "pretrained.act_postprocess4.3"),
    (r"^neck\.reassemble_stage\.layers\.3\.resize", "pretrained.act_postprocess4.4"),
    *((rf"^neck\.convs\.{i}", f"scratch.layer{i + 1}_rn") for i in range(4)),
    *((rf"^neck\.fusion_stage\.layers\.{i}", f"scratch.refinenet{4 - i}") for i in range(4)),
    (r"(refinenet\d)\.projection", r"\1.out_conv"),
    (r"residual_layer(\d)\.convolution(\d)", r"resConfUnit\1.conv\2"),
    (r"^head\.head", "scratch.output_conv"),
)


def config(**changed):
    """transformers' config of a tiny network whose last two states lie one layer apart."""
    backbone = BACKBONE | TINY_BACKBONE
    return transformers.DPTConfig(is_hybrid=True, backbone_config=backbone, **(TINY | changed))


def torch_model(seed=0):
    """Every norm, bias, token and position drawn; what comes out is not cut off at zero."""
    model = full_size.draw(transformers.DPTForDepthEstimation(config()), seed)
    return lifted(model)


def lifted(model):
    """The last bias raised, so that the final ReLU cuts nothing off."""
    with torch.no_grad():
        model.head.head[4].weight.abs_()
        model.head.head[4].bias.fill_(0.1)
    return model


def reference(model, image):
    """Inverse depth [B,H,W] of pictures [B,H,W,3] of any shape, by transformers' own parts.

    Its whole model takes its square size alone.
    """
    x = torch.tensor(image).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = model.dpt.embeddings(x, interpolate_pos_encoding=True)
        h, states = found.last_hidden_states, list(found.intermediate_activations)
        for i, layer in enumerate(model.dpt.encoder.layer):
            h = layer(h)
            if i in model.config.backbone_out_indices[2:]:
                states.append(h)
        joined = model.neck(states, x.shape[2] // 16, x.shape[3] // 16)
        return model.head(joined).numpy()


def picture(batch, height, width, seed=0):
    shape = (batch, height, width, 3)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def run(found, image):
    module, params = found
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(module.apply)({"params": params}, image))


def check(found, model, image, expected=None):
    """The relative error, printed."""
    expected = reference(model, image) if expected is None else expected
    assert expected.std() > 0.02 * expected.max()  # the maps say something
    error = relative_error(run(found, image), expected)
    print(f"{list(image.shape)}: {error:.1e}")
    assert error <= 1e-5
    return error


def original(tensors):
    """The tensors under the names of the original file, with the head that it has beside."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in ORIGINAL:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    for name in [name for name in found if "attention.attention.query" in name]:
        parts = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        found[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return {**found, "pretrained.model.head.weight": torch.zeros(10, 32)}


@pytest.fixture(scope="module")
def model():
    return torch_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dpt")
    model.save_pretrained(directory)
    return directory


def test_the_whole_model_at_its_own_size(model, saved):
    """Without interpolation, and by transformers' own forward pass."""
    image = picture(2, 96, 96)
    with torch.no_grad():
        expected = model(torch.tensor(image).permute(0, 3, 1, 2)).predicted_depth.numpy()
    np.testing.assert_array_equal(expected, reference(model, image))
    check(midas.load(saved), model, image, expected)


@pytest.mark.parametrize("size", [(128, 64), (32, 160)])
def test_other_sizes_interpolate_the_positions(model, saved, size):
    check(midas.load(saved), model, picture(2, *size))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_files_with_a_config_beside_them(model, saved, tmp_path, suffix):
    """In half precision, one by its own name."""
    half = torch_model().half().float()
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    tensors, path = {k: v.half() for k, v in half.state_dict().items()}, tmp_path / f"dpt{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    check(midas.load(path), half, picture(1, 64, 64))


def test_the_original_names(model):
    tensors = {k: v.numpy() for k, v in original(model.state_dict()).items()}
    assert len([name for name in tensors if name.startswith("pretrained.model.blocks.0.")]) == 12
    assert not [name for name in tensors if not name.startswith(("pretrained.", "scratch."))]
    check(midas.from_torch(tensors, model.config.to_dict()), model, picture(1, 64, 96))


@pytest.mark.slow
def test_the_published_size(tmp_path):
    """A minute and 4 GB. The sizes of a file without a config are these, in both layouts.

    The blocks of the ResNet add less than they keep, as in a trained network.
    """
    backbone = BACKBONE | PUBLISHED_BACKBONE
    theirs = transformers.DPTConfig(is_hybrid=True, backbone_config=backbone, **PUBLISHED)
    model = full_size.on_meta(lambda: transformers.DPTForDepthEstimation(theirs))
    model = lifted(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".norm3.weight" in name:  # as drawn, 16 blocks make PyTorch's own rounding 5e-5
                p.mul_(0.25)
    count = {name: p.numel() for name, p in model.named_parameters()}
    unused = sum(n for name, n in count.items() if UNUSED.match(name))
    torch.save(original(model.state_dict()), tmp_path / "dpt_hybrid.pt")
    save_file(model.state_dict(), tmp_path / "dpt.safetensors")
    found = midas.load(tmp_path / "dpt.safetensors")
    again = midas.load(tmp_path / "dpt_hybrid.pt")
    assert again[0] == found[0]
    flat, second = tree.flatten(found[1]), tree.flatten(again[1])
    assert all(np.array_equal(value, second[path]) for path, value in flat.items())
    parameters = sum(value.size for value in flat.values())
    assert parameters == sum(count.values()) - unused
    figures = {"parameters": parameters, "parameters_of_transformers": sum(count.values())}
    for size in ((384, 384), (352, 480)):
        name = "x".join(map(str, size))
        figures[f"relative_error_{name}"] = float(check(found, model, picture(1, *size)))
    print(figures)
    checks.record("MiDaS's DPT-hybrid against transformers", **figures)

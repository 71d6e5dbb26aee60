"""LoRA files against diffusers and PEFT: written here and loaded there, and the other way round."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin

from cnxs_jax import lora, tree
from cnxs_jax.convert import lora as lora_files
from cnxs_jax.convert import pixart
from cnxs_jax.models.dit import PixArt
from tests.parity.helpers import convert, nhwc, perturb, relative_error

pytestmark = pytest.mark.parity

TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "sample_size": 16,
    "cross_attention_dim": 24,
    "caption_channels": 20,
    "use_additional_conditions": False,
}
MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "linear", "linear_1",
           "linear_2", "proj_out", "pos_embed.proj"]  # fmt: skip


class Adapted(PixArtTransformer2DModel, PeftAdapterMixin):
    """diffusers' loader of LoRA files, which its PixArt class does not inherit."""


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 12, 4)).astype(np.float32)
    text = rng.normal(size=(2, 5, 20)).astype(np.float32)
    return x, np.array([17, 803]), text


def torch_model():
    torch.manual_seed(0)
    return perturb(Adapted(**TINY))


@pytest.fixture(scope="module")
def ours(inputs):
    """`(params, parameters -> output)`, compiled once."""
    params = convert(torch_model().state_dict(), scanned=("transformer_blocks",))
    x, t, text = (jnp.asarray(v) for v in inputs)
    module = PixArt(**TINY)

    @jax.jit
    def run(params):
        return module.apply({"params": params}, x, t, {"text": text})

    def at_highest(params):
        with jax.default_matmul_precision("highest"):
            return run(params)

    return params, at_highest


def theirs(model, inputs):
    x, t, text = (torch.tensor(v) for v in inputs)
    with torch.no_grad():
        out = model(x.permute(0, 3, 1, 2), encoder_hidden_states=text, timestep=t,
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None})  # fmt: skip
    return nhwc(out.sample)


def filled(params, targets=lora.PIXART_TARGETS, rank=3, alpha=5.0, seed=1):
    rng = np.random.default_rng(seed)
    fresh = lora.init(params, targets, rank, jax.random.key(0), alpha)
    return tree.map_with_path(
        lambda p, v: v if p.endswith("scale") else jnp.asarray(0.1 * rng.normal(size=v.shape)),
        fresh,
    )


def check(ours, expected, adapter):
    """Merged parameters give the other side's output, and the adapter is no small thing."""
    params, run = ours
    error = relative_error(run(lora.merge(params, adapter)), expected)
    assert relative_error(run(params), expected) > 0.02  # 2000 times the bound below
    print(f"{error:.2e}")
    assert error <= 1e-5


def test_written_directory_loads_in_peft(ours, inputs, tmp_path):
    adapter = filled(ours[0])
    lora_files.save(adapter, tmp_path / "lora", pixart.DIFFUSERS)
    model = peft.PeftModel.from_pretrained(torch_model(), tmp_path / "lora").eval()
    check(ours, theirs(model, inputs), adapter)


@pytest.mark.parametrize("metadata", [False, True])
def test_written_file_loads_in_diffusers(ours, inputs, tmp_path, metadata):
    """With the file's metadata, as diffusers' pipelines read it, and without."""
    adapter = filled(ours[0])
    # a module with an alpha of its own
    adapter["proj_out"]["scale"] = 2 * adapter["proj_out"]["scale"]
    lora_files.save(adapter, tmp_path / "lora.safetensors", pixart.DIFFUSERS)
    model = torch_model()
    where = {"weight_name": "lora.safetensors"} if metadata else {}
    path = tmp_path if metadata else tmp_path / "lora.safetensors"
    model.load_lora_adapter(str(path), prefix="transformer", **where)
    check(ours, theirs(model.eval(), inputs), adapter)


def random_factors(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 1}}])
def test_directory_of_peft_loads_here(ours, inputs, tmp_path, options):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, **options)
    model = random_factors(peft.get_peft_model(torch_model(), config))
    model.save_pretrained(tmp_path)
    adapter = lora_files.load(tmp_path, ours[0], pixart.DIFFUSERS)
    check(ours, theirs(model, inputs), adapter)


def test_file_of_diffusers_loads_here(ours, inputs, tmp_path):
    model = torch_model()
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0"]))
    random_factors(model).save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    adapter = lora_files.load(file, ours[0], pixart.DIFFUSERS)
    check(ours, theirs(model, inputs), adapter)


def test_two_adapters_with_weights(ours, inputs, tmp_path):
    """`merge(params, [one, two], [0.7, -0.3])` is diffusers' `set_adapters`."""
    adapters = [filled(ours[0], seed=1), filled(ours[0], lora.ATTENTION_TARGETS, rank=2, seed=2)]
    model, names = torch_model(), ["one", "two"]
    for name, adapter in zip(names, adapters, strict=True):
        file = tmp_path / f"{name}.safetensors"
        lora_files.save(adapter, file, pixart.DIFFUSERS)
        model.load_lora_adapter(str(file), prefix="transformer", adapter_name=name)
    model.set_adapters(names, [0.7, -0.3])
    params, run = ours
    merged = run(lora.merge(params, adapters, [0.7, -0.3]))
    assert relative_error(merged, theirs(model.eval(), inputs)) <= 1e-5

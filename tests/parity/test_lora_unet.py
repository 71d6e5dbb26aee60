"""LoRA of a UNet against diffusers and PEFT, both ways: linear layers and convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from cnxs_jax import lora
from cnxs_jax.convert import lora as lora_files
from cnxs_jax.convert import unet as layouts
from cnxs_jax.models.unet import UNet
from configs.sd_lcm import TARGETS
from tests.parity.helpers import convert, nhwc, relative_error
from tests.parity.test_lora import filled, random_factors
from tests.parity.test_unet import CONFIGS, inputs, make

pytestmark = pytest.mark.parity
# What diffusers' LCM-LoRA script adapts.
MODULES = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
           "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
           "time_emb_proj"]  # fmt: skip


@pytest.fixture(scope="module")
def ours():
    """`(params, parameters -> output, diffusers' arguments)`, compiled once."""
    params = convert(make("sd15").state_dict())
    x, t, cond, arguments = inputs(CONFIGS["sd15"], (8, 8))
    module = UNet(**CONFIGS["sd15"])
    run = jax.jit(lambda params: module.apply({"params": params}, x, t, cond))

    def at_highest(params):
        with jax.default_matmul_precision("highest"):
            return run(params)

    return params, at_highest, arguments


def check(ours, model, adapter):
    params, run, arguments = ours
    with torch.no_grad():
        expected = nhwc(model(**arguments).sample)
    error = relative_error(run(lora.merge(params, jax.tree.map(jnp.asarray, adapter))), expected)
    assert relative_error(run(params), expected) > 0.02  # 2000 times the bound below
    print(f"{error:.2e}")
    assert error <= 1e-5


def test_a_file_written_here_loads_in_diffusers(ours, tmp_path):
    adapter = filled(ours[0], TARGETS, rank=2)
    lora_files.save(adapter, tmp_path / "lora.safetensors", layouts.DIFFUSERS, "unet")
    model = make("sd15")
    model.load_lora_adapter(str(tmp_path / "lora.safetensors"), prefix="unet")
    check(ours, model.eval(), adapter)


def test_a_file_of_diffusers_loads_here(ours, tmp_path):
    """Both sides adapt the same modules."""
    model = make("sd15")
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=MODULES))
    random_factors(model).save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    adapter = lora_files.load(file, ours[0], layouts.DIFFUSERS)
    check(ours, model, adapter)
    own = lora.init(ours[0], TARGETS, 2, jax.random.key(0))
    assert lora.modules(own).keys() == lora.modules(adapter).keys()
    sizes = [{k: np.shape(v["lora_A"]) for k, v in lora.modules(a).items()} for a in (own, adapter)]
    assert sizes[0] == sizes[1]

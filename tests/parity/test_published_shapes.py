"""Every tensor of the released pipelines by name and shape, against PyTorch on the meta device."""

import jax
import numpy as np
import pytest
import torch

from cnxs_jax.convert import families, rules
from configs import pixart_lcm
from train import networks

pytestmark = pytest.mark.parity


def theirs(name, size):
    """The PyTorch module of one component, without memory."""
    from diffusers import AutoencoderKL, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        if name == "transformer":
            return PixArtTransformer2DModel(sample_size=size // 8, caption_channels=4096)
        if name == "vae":
            return AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )
        sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
        return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))


@pytest.mark.parametrize(
    ("name", "size"),
    [("transformer", 256), ("transformer", 512), ("transformer", 1024), ("vae", 512),
     ("text_encoder", 512)],
)  # fmt: skip
def test_names_and_shapes_are_those_of_pytorch(name, size):
    config = pixart_lcm.get_config(f"xl_{size}")
    module, shapes = networks.modules(config, config.teacher_path)[name]
    expected = {k: tuple(v.shape) for k, v in theirs(name, size).state_dict().items()}
    expected.pop("encoder.embed_tokens.weight", None)  # shared.weight by another name
    family = families.family_of_module(module)
    flat = jax.tree.map(lambda s: np.broadcast_to(np.int8(0), s.shape), shapes)
    found = rules.to_tensors(flat, family.save_table or family.table)
    assert {k: v.shape for k, v in found.items()} == expected

"""diffusers' model of a UNet and a ControlNet-XS in one, without PyTorch: tensors and configs."""

import dataclasses
import json

import numpy as np
import pytest

from cnxs_jax.control import controlnet_xs
from cnxs_jax.convert import __main__ as command
from cnxs_jax.convert import controlnet_xs_fused as fused
from cnxs_jax.convert import families, rules
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.pipelines import load
from tests.control.unets import BASE
from tests.convert.test_controlnet_xs import numbered, tiny


def test_fused_is_split_and_joined():
    module = tiny()
    base, own = numbered(BASE), numbered(module)
    parts = {"unet": rules.to_tensors(base), "controlnet": rules.to_tensors(own)}
    joined = fused.join(parts["unet"], parts["controlnet"])
    assert len(joined) == len(parts["unet"]) + len(parts["controlnet"])
    assert fused.is_fused(joined)
    again = fused.split(joined)
    for name, tensors in parts.items():
        assert again[name].keys() == tensors.keys()
        assert all(again[name][key] is tensors[key] for key in tensors)
    with pytest.raises(CheckpointError, match=r"(?s)neither base nor controller.*ctrl_conv_on"):
        fused.split({**joined, "ctrl_conv_on.weight": np.zeros(1)})


# {field: another value} of base and adapter that the fused model keeps, and that it cannot hold.
FUSED_KEPT = (
    {
        **{"sample_size": 16, "norm_num_groups": 2, "cross_attention_dim": 20},
        **{"block_out_channels": (8, 24), "transformer_layers_per_block": (1, 2)},
        **{"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": 6},
        **{"projection_class_embeddings_input_dim": 46, "time_cond_proj_dim": 8},
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    {
        **{"conditioning_channels": 1, "conditioning_channel_order": "bgr"},
        **{"conditioning_embedding_out_channels": (4, 6, 8), "time_embedding_mix": 0.5},
        **{"learn_time_embedding": False, "num_attention_heads": (1, 2)},
        **{"block_out_channels": (6, 10), "max_norm_num_groups": 3},
    },
)
FUSED_REFUSED = (
    {"layers_per_block": (2, 1), "in_channels": 9, "out_channels": 8}
    | {"mid_block_type": None, "norm_eps": 1e-6},
    {"control_type": "A", "infusion": "add", "attention_head_width": 3, "in_channels": 9}
    | {"layers_per_block": 1, "base_block_out_channels": (8, 24), "cross_attention_dim": 20}
    | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    | {"transformer_layers_per_block": 2, "use_linear_projection": True},
)


@pytest.mark.parametrize("part", [0, 1])
def test_fused_config_is_split_and_joined(part):
    """For every field of the base and of the adapter: it comes back, or is refused by name."""
    base = BASE.clone(layers_per_block=2)
    both = [base, controlnet_xs.from_unet(base, block_out_channels=(4, 6), num_attention_heads=2,
                                          learn_time_embedding=True)]  # fmt: skip
    kept, refused = FUSED_KEPT[part], FUSED_REFUSED[part]
    without = {"sample_size", "upcast_attention"} if part else set()  # the base's, no effect
    fields = {f.name for f in dataclasses.fields(both[part])} - set(families.RUNTIME)
    assert fields == {*kept, *refused} | without
    for key, value in {**kept, **refused}.items():
        changed = list(both)
        changed[part] = both[part].clone(**{key: value})
        if part == 0 and key in kept:  # the adapter of this base
            own = {"block_out_channels": (4, 6), "num_attention_heads": 2}
            changed[1] = controlnet_xs.from_unet(changed[0], learn_time_embedding=True, **own)
        configs = [families.config_of(module) for module in changed]
        if key in refused:
            with pytest.raises(ConfigError, match=f"cannot hold.* {key} = "):
                fused.join_config(*configs)
            continue
        parts = fused.split_config(json.loads(json.dumps(fused.join_config(*configs))))
        for config, module in zip(parts.values(), changed, strict=True):
            del config["_class_name"]
            back = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
            assert type(module)(**back) == module, key


def test_an_adapter_is_not_fused_with_another_base(tmp_path):
    """`convert --to=fused` names the base; nothing else has looked whether it fits."""
    base = BASE.clone(layers_per_block=2, use_linear_projection=True)
    module = controlnet_xs.from_unet(base, block_out_channels=(4, 8), num_attention_heads=2)
    other = base.clone(block_out_channels=(8, 24))
    load.save_model(other, numbered(other), tmp_path / "base")
    load.save_model(module, numbered(module), tmp_path / "adapter")
    paths = [str(tmp_path / name) for name in ("adapter", "fused", "base")]
    words = r"base_block_out_channels = \(8, 16\) \(the base: \(8, 24\)\)"
    with pytest.raises(ConfigError, match=words):
        command.main([paths[0], paths[1], "--to=fused", f"--base={paths[2]}"])
    assert not (tmp_path / "fused").exists()

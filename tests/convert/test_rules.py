"""The rule tables: bijections on random weights, and strict about everything that does not fit."""

import jax
import numpy as np
import pytest

from cnxs_jax import tree
from cnxs_jax.convert import families, pixart, rules, t5, vae
from cnxs_jax.errors import CheckpointError

PIXART, VAE, T5 = families.FAMILIES[:3]
TINY_PIXART = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "cross_attention_dim": 48,
    "caption_channels": 10,
    "sample_size": 8,
}
TINY_VAE = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
TINY_T5 = {
    "vocab_size": 20,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 3,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}


def target_of(family, config):
    return families.build(family, config, "test")[1]


def random_params(target, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), target)


CASES = {
    "pixart": (PIXART, TINY_PIXART, pixart.DIFFUSERS),
    "pixart_ms": (PIXART, TINY_PIXART | {"use_additional_conditions": True}, pixart.DIFFUSERS),
    "pixart_official": (PIXART, TINY_PIXART, pixart.OFFICIAL),
    "pixart_official_ms": (
        PIXART,
        TINY_PIXART | {"use_additional_conditions": True},
        pixart.OFFICIAL,
    ),
    "vae": (VAE, TINY_VAE, vae.DIFFUSERS),
    "vae_old_attention": (VAE, TINY_VAE, vae.OLD_ATTENTION),
    "t5": (T5, TINY_T5, t5.TRANSFORMERS),
}


@pytest.mark.parametrize("case", CASES)
def test_tables_are_bijections(case):
    family, config, table = CASES[case]
    target = target_of(family, config)
    params = random_params(target)
    tensors = rules.to_tensors(params, table)
    back = rules.to_params(tensors, target, table)
    assert tree.flatten(back).keys() == tree.flatten(params).keys()
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert sum(t.size for t in tensors.values()) == tree.size(params)


@pytest.fixture(scope="module")
def official():
    target = target_of(PIXART, TINY_PIXART)
    return target, rules.to_tensors(random_params(target), pixart.OFFICIAL)


def test_thirds_of_qkv_come_before_the_heads(official):
    target, tensors = official
    params = rules.to_params(tensors, target, pixart.OFFICIAL)
    qkv = tensors["blocks.2.attn.qkv.weight"]
    assert qkv.shape == (144, 48)
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        kernel = params["transformer_blocks"]["attn1"][name]["kernel"][2]
        np.testing.assert_array_equal(kernel, qkv[48 * i : 48 * (i + 1)].T)
    kv = tensors["blocks.0.cross_attn.kv_linear.bias"]
    np.testing.assert_array_equal(params["transformer_blocks"]["attn2"]["to_v"]["bias"][0], kv[48:])
    conv = tensors["x_embedder.proj.weight"]
    kernel = params["pos_embed"]["proj"]["kernel"]
    assert kernel[1, 0, 3, 7] == conv[7, 3, 1, 0]


def test_all_problems_are_listed_together(official):
    target, tensors = official
    bad = dict(tensors)
    bad["t_block.1.weigth"] = bad.pop("t_block.1.weight")
    bad["blocks.3.mlp.fc1.bias"] = bad["blocks.2.mlp.fc1.bias"]
    bad["blocks.1.mlp.fc1.weight"] = bad["blocks.1.mlp.fc1.weight"].T
    bad["final_layer.linear.bias"] = np.full(32, np.nan, np.float32)
    bad["x_embedder.proj.bias"] = np.arange(48)
    del bad["blocks.0.attn.qkv.weight"]
    with pytest.raises(CheckpointError) as caught:
        rules.to_params(bad, target, pixart.OFFICIAL, where="tiny.pth")
    message = str(caught.value)
    for words in (
        "4 missing tensors",
        "adaln_single.linear.weight",
        "transformer_blocks.0.attn1.to_k.weight",
        "t_block.1.weigth",
        "blocks.3.mlp.fc1.bias: the model has 3 layers",
        "blocks.1.mlp.fc1.weight: got (48, 192), expected (192, 48)",
        "1 tensors with NaN or Inf",
        "x_embedder.proj.bias: got int64",
        "tiny.pth",
    ):
        assert words in message


def test_long_lists_are_cut_and_counted(official):
    target, tensors = official
    with pytest.raises(CheckpointError) as caught:
        rules.to_params({"x": np.ones(1)}, target, pixart.OFFICIAL)
    message = str(caught.value)
    count = len(rules.to_tensors(random_params(target), pixart.DIFFUSERS))
    assert f"{count} missing tensors" in message
    assert f"and {count - 20} more" in message
    assert message.count("\n") < 30


def test_nearest_name_is_offered():
    target = target_of(PIXART, TINY_PIXART)
    tensors = rules.to_tensors(random_params(target), pixart.DIFFUSERS)
    tensors["proj_uot.weight"] = tensors.pop("proj_out.weight")
    with pytest.raises(CheckpointError, match=r"proj_uot.weight \(nearest: proj_out.weight\)"):
        rules.to_params(tensors, target, pixart.DIFFUSERS)


def test_names_with_a_foreign_prefix_are_hinted_without_comparing_all(monkeypatch):
    target = target_of(PIXART, TINY_PIXART | {"num_layers": 28})
    shapes = tree.flatten(target).items()
    keys = [k for path, leaf in shapes for k in rules.keys_of(path, leaf.shape, pixart.DIFFUSERS)]
    assert len(keys) > 400
    pairs = []
    real = rules.difflib.get_close_matches

    def counted(name, choices, **keywords):
        pairs.append(len(choices))
        return real(name, choices, **keywords)

    monkeypatch.setattr(rules.difflib, "get_close_matches", counted)
    with pytest.raises(CheckpointError) as caught:
        rules.to_params({f"model.{k}": np.ones(1) for k in keys}, target, pixart.DIFFUSERS)
    lines = [line.split() for line in str(caught.value).splitlines() if "nearest" in line]
    assert len(lines) == 40
    for name, _, nearest in lines:
        assert name.removeprefix("model.") == nearest.strip(")").removeprefix("model.")
    assert sum(pairs) <= 1000  # of 350 000


def test_every_single_missing_tensor_is_noticed(official):
    target, tensors = official
    for key in tensors:
        with pytest.raises(CheckpointError, match="missing"):
            rules.to_params({k: v for k, v in tensors.items() if k != key}, target, pixart.OFFICIAL)


def test_incomplete_parameters_cannot_be_exported(official):
    target, _ = official
    params = random_params(target)
    del params["transformer_blocks"]["attn1"]["to_k"]["bias"]
    with pytest.raises(CheckpointError, match=r"blocks.1.attn.qkv.bias: 2 of 3 parts"):
        rules.to_tensors(params, pixart.OFFICIAL)


def test_weights_too_large_for_half_precision_are_refused(official):
    target, tensors = official
    large = {**tensors, "t_block.1.bias": tensors["t_block.1.bias"] + 1e6}
    assert rules.to_params(large, target, pixart.OFFICIAL)
    with pytest.raises(CheckpointError, match="1 tensors too large for float16"):
        rules.to_params(large, target, pixart.OFFICIAL, dtype=np.float16)


def test_null_caption_and_position_table(official):
    target, tensors = official
    caption = np.arange(30, dtype=np.float16).reshape(3, 10)
    tensors = {**tensors, "y_embedder.y_embedding": caption, "pos_embed": np.zeros((1, 16, 48))}
    params = rules.to_params(tensors, target, pixart.OFFICIAL)
    side = rules.side_tensors(tensors, pixart.OFFICIAL)
    assert side["null_caption"].dtype == np.float32
    np.testing.assert_array_equal(side["null_caption"], caption)
    back = rules.to_tensors(params, pixart.OFFICIAL, side)
    np.testing.assert_array_equal(back["y_embedder.y_embedding"], caption)


@pytest.mark.parametrize(("multi_scale", "count"), [(True, 445), (False, 437)])
def test_key_counts_of_the_published_models(multi_scale, count):
    module, target = families.build(PIXART, {"use_additional_conditions": multi_scale}, "XL/2")
    assert module.num_layers == 28
    # Zero-stride views: nothing of the 2.4 GB is allocated.
    params = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), target)
    flat = {}
    for path, leaf in tree.flatten(params).items():
        for key in rules.keys_of(path, leaf.shape, pixart.DIFFUSERS):
            flat[key] = None
    sources = {
        rule.source.format(**match.groupdict())
        for key in flat
        for rule in pixart.OFFICIAL.rules
        for target_name in rule.targets
        if (match := rules.template_regex(target_name).fullmatch(key))
    }
    # The null caption and the position table are the two tensors that are no parameters.
    assert len(sources) + len(pixart.OFFICIAL.side) + len(pixart.OFFICIAL.ignore) == count
    assert tree.size(target) == (611_349_152 if multi_scale else 610_856_096)


def test_old_attention_of_the_vae_may_be_a_convolution():
    target = target_of(VAE, TINY_VAE)
    params = random_params(target)
    tensors = rules.to_tensors(params, vae.OLD_ATTENTION)
    key = "decoder.mid_block.attentions.0.query.weight"
    assert tensors[key].shape == (16, 16)
    tensors[key] = tensors[key][:, :, None, None]
    back = rules.to_params(tensors, target, vae.OLD_ATTENTION)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    new = rules.to_tensors(params, vae.DIFFUSERS)
    jax.tree.map(
        np.testing.assert_array_equal, rules.to_params(new, target, vae.OLD_ATTENTION), params
    )


def test_tied_embeddings_of_t5():
    target = target_of(T5, TINY_T5)
    params = random_params(target)
    tensors = rules.to_tensors(params, t5.TRANSFORMERS)
    shared = tensors["shared.weight"]
    alias = {**tensors, "encoder.embed_tokens.weight": shared, "decoder.x.weight": shared}
    back = rules.to_params(alias, target, t5.TRANSFORMERS)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    del alias["shared.weight"]
    back = rules.to_params(alias, target, t5.TRANSFORMERS)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(CheckpointError, match="1 tied tensors that differ"):
        rules.to_params({**alias, "shared.weight": shared + 1}, target, t5.TRANSFORMERS)

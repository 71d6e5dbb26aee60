"""ControlNet-XS's layouts without PyTorch: names, round trips, what is ignored or refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cnxs_jax import control, tree
from cnxs_jax.control import controlnet_xs
from cnxs_jax.control.controlnet_xs import ControlNetXS
from cnxs_jax.convert import __main__ as command
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import controlnet_xs_fused as fused
from cnxs_jax.convert import controlnet_xs_scales as scales_of
from cnxs_jax.convert import families, files, rules
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.pipelines import load, save_xs
from tests.control.unets import BASE, HINT_WIDTHS, base_params, inputs, perturbed, run

# (name in the original layout, in the older one, ours) of SD 2.1's adapter, from its files.
NAMES = """
control_model.input_blocks.0.0.weight | control_model.conv_in.weight | conv_in/kernel
control_model.input_blocks.5.0.emb_layers.1.bias
    | control_model.down_blocks.1.resnets.1.time_emb_proj.bias
    | down_blocks_1/resnets_1/time_emb_proj/bias
control_model.input_blocks.6.0.op.weight
    | control_model.down_blocks.1.downsamplers.0.conv.weight
    | down_blocks_1/downsamplers/conv/kernel
control_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.bias
    | control_model.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias
    | mid_block/midblock/attentions_0/transformer_blocks_0/attn2/to_out_0/bias
control_model.time_embed.2.weight
    | control_model.time_embedding.linear_2.weight | time_embedding/linear_2/kernel
enc_zero_convs_in.3.0.bias | down_zero_convs_in.3.bias | down_blocks_1/base_to_ctrl_0/bias
enc_zero_convs_in.11.0.bias | down_zero_convs_in.11.bias | mid_block/base_to_ctrl/bias
enc_zero_convs_out.0.0.bias | down_zero_convs_out.0.bias | control_to_base_for_conv_in/bias
enc_zero_convs_out.3.0.bias | down_zero_convs_out.3.bias | down_blocks_0/ctrl_to_base_2/bias
middle_block_out.0.bias | middle_block_out.bias | mid_block/ctrl_to_base/bias
dec_zero_convs_out.4.0.bias | up_zero_convs_out.4.bias | up_connections_1/ctrl_to_base_1/bias
input_hint_block.14.weight
    | controlnet_cond_embedding.conv_out.weight | controlnet_cond_embedding/conv_out/kernel
input_hint_block.4.weight
    | controlnet_cond_embedding.blocks.1.weight | controlnet_cond_embedding/blocks_1/kernel
"""
BASES = "base_block_out_channels"
# Tensors of the published adapters, without the scales and what no layer reads.
COUNTS = {"sd21_14m": 402, "sd15_53m": 398, "sdxl_20m": 882, "sdxl_48m": 886}
KINDS = [("A", "cat", False), ("B", "cat", True), ("B", "add", False), ("C", "cat", True)]


def shapes_of(module):
    family = families.family_of_module(module)
    return jax.eval_shape(module.init, jax.random.key(0), *family.example(module))["params"]


def tiny(control_type="B", infusion="cat", learn=True):
    kind = {"control_type": control_type, "infusion": infusion, "learn_time_embedding": learn}
    heads = {"num_attention_heads": 2}
    return controlnet_xs.from_unet(BASE, block_out_channels=(4, 6), **kind, **heads, **HINT_WIDTHS)


def numbered(module):
    """Parameters of which every number is another one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes_of(module))


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_names_of_sd21():
    module = ControlNetXS(**layouts.PUBLISHED["sd21_14m"])
    paths = {path: np.float32(i) for i, path in enumerate(tree.flatten(shapes_of(module)))}
    flat = tree.unflatten(paths)
    for table, column in ((layouts.official(module), 0), (layouts.research(module), 1)):
        named = {str(value): name for name, value in rules.to_tensors(flat, table).items()}
        assert len(named) == 402
        for row in NAMES.replace("\n   ", "").strip().splitlines():
            names = [name.strip() for name in row.split("|")]
            assert named[str(paths[names[2]])] == names[column]


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_layouts_of_the_published_sizes_are_bijections(name, count):
    """There and back in all four, by names and shapes: a tensor holds one number, its place's."""
    module = ControlNetXS(**layouts.PUBLISHED[name])
    target = shapes_of(module)
    places = {path: i for i, path in enumerate(tree.flatten(target))}
    params = tree.map_with_path(
        lambda path, leaf: np.broadcast_to(np.float32(places[path]), leaf.shape), target
    )
    named = rules.to_tensors(params)
    joined = fused.join({}, named)
    parts = fused.split(joined)
    assert parts["unet"] == {}
    for tensors, table in (
        (named, layouts.DIFFUSERS),
        (rules.to_tensors(params, layouts.official(module)), layouts.official(module)),
        (rules.to_tensors(params, layouts.research(module)), layouts.research(module)),
        (parts["controlnet"], layouts.DIFFUSERS),
    ):
        assert len(tensors) == count == len(joined)
        plan = rules.fit(tensors, target, table)[0]  # which checks the shapes, and copies nothing
        assert {path: array.flat[0] for path, _, _, array in plan} == places
        assert len(plan) == count


@pytest.mark.parametrize("kind", KINDS)
def test_official_round_trip(kind):
    module = tiny(*kind)
    params = numbered(module)
    tensors = layouts.official_tensors(module, params)
    count = len(tensors) - 1
    assert count == len(tree.flatten(params))
    assert tensors["scale_list"].shape == (9 if kind[0] != "A" else 5,)
    assert layouts.is_official(tensors)
    back = rules.to_params(tensors, params, layouts.official(module))
    assert_equal(back, params)


def test_research_round_trip_and_its_spare_time_embedding():
    for learn in (True, False):
        module = tiny(learn=learn)
        params = numbered(module)
        tensors = rules.to_tensors(params, layouts.research(module))
        assert layouts.is_research(tensors)
        assert not layouts.is_official(tensors)
        spare = {"control_model.time_embedding.linear_1.weight": np.zeros((32, 8), np.float32)}
        table = layouts.research(module)
        assert_equal(rules.to_params(spare | tensors, params, table), params)
        assert layouts.unused(spare | tensors, table) == ([] if learn else list(spare))


def test_a_file_is_opened_by_its_names(tmp_path):
    """Original names with a config; unused tensors are told, others refused."""
    module = tiny()
    params, config = numbered(module), families.config_of(module)
    tensors = layouts.official_tensors(module, params)
    spare = {"control_model.label_emb.0.0.bias": np.zeros(3, np.float32)}
    file = tmp_path / "adapter.safetensors"
    files.write_safetensors(file, tensors | spare)
    with pytest.warns(UserWarning, match=r"1 tensors are not used: control_model.label_emb.0.0"):
        opened, found = load.load_model(file, config=config)
    assert opened == module
    assert_equal(jax.tree.map(np.asarray, found), params)
    del tensors["middle_block_out.0.bias"]
    files.write_safetensors(file, {**tensors, "middle_block_on.0.bias": np.zeros(16, np.float32)})
    with pytest.raises(CheckpointError, match=r"(?s)mid_block.ctrl_to_base.bias.*middle_block_on"):
        load.load_model(file, config=config)


def test_saved_as_official_and_opened(tmp_path):
    module = tiny("C")
    params, file = numbered(module), tmp_path / "adapter.safetensors"
    load.save_official(module, params, file)
    opened, found = load.load_model(file, config=families.config_of(module))
    assert opened == module
    assert_equal(jax.tree.map(np.asarray, found), params)


def test_directories_of_the_command_line(tmp_path):
    """Adapter and base to one fused model and back; to the older class and back."""
    two = BASE.clone(layers_per_block=2, use_linear_projection=True)
    fields = {"num_attention_heads": 2, "learn_time_embedding": True, "max_norm_num_groups": 32}
    module = controlnet_xs.from_unet(two, block_out_channels=(4, 8), **fields)
    base, own = numbered(two), numbered(module)
    load.save_model(two, base, tmp_path / "base")
    load.save_model(module, own, tmp_path / "adapter")
    adapter, paths = str(tmp_path / "adapter"), [str(tmp_path / n) for n in ("fused", "research")]
    command.main([adapter, paths[0], "--to=fused", f"--base={tmp_path / 'base'}"])
    command.main([adapter, paths[1], "--to=research"])
    for place, expected, numbers in (
        ((paths[0], "unet"), two, base),
        ((paths[0], "controlnet"), module, own),
        ((paths[1],), module, own),
    ):
        opened, found = load.load_model(*place)
        assert opened == expected
        assert_equal(jax.tree.map(np.asarray, found), numbers)
    with pytest.raises(ConfigError, match="base and controller: unet, controlnet"):
        load.load_model(paths[0])
    with pytest.raises(ConfigError, match="give --base"):
        command.main([adapter, paths[0], "--to=fused"])
    with pytest.raises(ConfigError, match="no layout 'research' of UNet"):
        command.main([str(tmp_path / "base"), paths[1], "--to=research"])
    with pytest.raises(ConfigError, match="the layout diffusers is a directory"):
        command.main([adapter, str(tmp_path / "own.safetensors")])


@pytest.mark.parametrize("name", layouts.PUBLISHED)
def test_published_files_are_recognised_by_their_sizes(name):
    config = layouts.PUBLISHED[name]
    width, text = config["block_out_channels"][0], config["cross_attention_dim"]
    key = "control_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    first = "control_model.input_blocks.0.0.weight"
    tensors = {first: np.zeros((width, 4, 3, 3)), "input_hint_block.0.weight": np.zeros(1)}
    tensors[key] = np.zeros((2 * width, text))
    assert layouts.config_of(tensors, "file") is config
    tensors[first] = np.zeros((width + 1, 4, 3, 3))
    with pytest.raises(CheckpointError, match="no published ControlNet-XS"):
        layouts.config_of(tensors, "file")


def test_connection_scales_of_a_file():
    """A list of ones says nothing; type A's has no encoder."""
    module = tiny("A")
    tensors = layouts.official_tensors(module, numbered(module))
    assert scales_of.connection_scales(tensors, module) is None
    tensors["scale_list"] = np.array([0.5, 1, 1, 1, 0.25], np.float32)
    scales = scales_of.connection_scales(tensors, module)
    np.testing.assert_array_equal(scales, [1, 1, 1, 1, 0.5, 1, 1, 1, 0.25])
    for bad in ([0.5] * 9, 0.5, [0.5, 1, 1, 1, np.nan]):
        tensors["scale_list"] = np.array(bad, np.float32)
        with pytest.raises(CheckpointError, match="expected 5 finite numbers"):
            scales_of.connection_scales(tensors, module)


@pytest.mark.parametrize("kind", ["A", "B", pytest.param("C", marks=pytest.mark.slow)])
def test_a_file_with_scales_is_the_network_with_these_scales(kind, tmp_path):
    """Opened, it is what `connection_scale` makes of the unscaled one; and written, it still is."""
    module = tiny(kind)
    params, config = perturbed(numbered(module)), families.config_of(module)
    tensors = layouts.official_tensors(module, params)
    count = len(tensors["scale_list"])
    tensors["scale_list"] = np.linspace(1.6, -0.4, count, dtype=np.float32)
    files.write_safetensors(tmp_path / "scaled.safetensors", tensors)
    _, scaled = load.load_model(tmp_path / "scaled.safetensors", config=config)
    load.save_official(module, scaled, tmp_path / "again.safetensors")
    again = files.read_tensors(tmp_path / "again.safetensors")
    np.testing.assert_array_equal(again["scale_list"], np.ones(count))
    _, opened = load.load_model(tmp_path / "again.safetensors", config=config)
    assert_equal(*(jax.tree.map(np.asarray, found) for found in (opened, scaled)))
    controlled, whole = control.attach(BASE, base_params(), module, params)
    x, t, cond = inputs()
    plain = run(controlled, whole, x, t, cond)
    cond["connection_scale"][:, -count:] = tensors["scale_list"]
    expected = run(controlled, whole, x, t, cond)
    cond["connection_scale"][:] = 1
    found = run(controlled, {**whole, "control": scaled}, x, t, cond)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert np.abs(plain - expected).max() > 1e-2


@pytest.mark.parametrize("name", ["sd21_14m", "sdxl_20m", "sdxl_48m"])
def test_configs_of_the_older_class(name):
    """Written and read again; the base's sizes as the published SDXL config has them."""
    module = ControlNetXS(**layouts.PUBLISHED[name])
    config = layouts.to_research(module)
    fields = layouts.of_research(config)
    kept = {k: v for k, v in fields.items() if k != "_class_name"}
    assert ControlNetXS(**kept | {"base_block_out_channels": tuple(fields[BASES])}) == module
    if name == "sdxl_48m":
        sizes = config["base_model_channel_sizes"]
        down = [320, 320, 320, 320, 640, 640, 640, 1280, 1280]
        assert sizes["down"] == list(zip([4, *down], down, strict=False))
        up = [2560, 2560, 1920, 1920, 1280, 960, 960, 640, 640]
        assert sizes["up"] == list(zip(up, [1280] * 3 + [640] * 3 + [320] * 3, strict=True))


# {field: another value of it}; the older class keeps it, or has no place for it.
KEPT = {
    "conditioning_channels": 1,
    "conditioning_channel_order": "bgr",
    "conditioning_embedding_out_channels": (4, 6, 8),
    "time_embedding_mix": 0.5,
    "learn_time_embedding": False,
    "num_attention_heads": (1, 2),
    "block_out_channels": (6, 10),
    "base_block_out_channels": (8, 24),
    "cross_attention_dim": 20,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "sample_size": None,
    "transformer_layers_per_block": (1, 2),
    "upcast_attention": True,
}
REFUSED = {
    "max_norm_num_groups": 4,
    "use_linear_projection": False,
    "control_type": "C",
    "infusion": "add",
    "attention_head_width": (3, 3),
    "layers_per_block": (2, 1),
    "in_channels": 9,
}


def older():
    """An adapter that the older class can be."""
    base = BASE.clone(layers_per_block=2, use_linear_projection=True)
    fields = {"num_attention_heads": 2, "learn_time_embedding": True, "max_norm_num_groups": 32}
    return controlnet_xs.from_unet(base, block_out_channels=(4, 8), **fields, **HINT_WIDTHS)


def test_the_older_class_is_read_back_or_refused():
    """For every field of the adapter."""
    fields = {f.name for f in dataclasses.fields(ControlNetXS)} - set(families.RUNTIME)
    assert fields == {*KEPT, *REFUSED}
    for key, value in KEPT.items():
        module = older().clone(**{key: value})
        config = json.loads(json.dumps(layouts.to_research(module)))
        back = layouts.of_research(config)
        del back["_class_name"]
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in back.items()}
        assert ControlNetXS(**tuples) == module, key
        widths = *module.block_out_channels, *module.base_block_out_channels
        assert not any(width % config["norm_num_groups"] for width in widths)
    for key, value in REFUSED.items():
        with pytest.raises(ConfigError, match=f"cannot hold {key} = "):
            layouts.to_research(older().clone(**{key: value}))


def test_the_older_class_finds_its_own_time_embedding(tmp_path):
    """It does not open a file without one, where the base's is shared, too."""
    module = older().clone(learn_time_embedding=False)
    params = numbered(module)
    save_xs.save_research(module, params, tmp_path)
    tensors = files.read_tensors(tmp_path / save_xs.FILE)
    spare = {k: t.shape for k, t in tensors.items() if ".time_embedding." in k}
    linear = {"1.weight": (32, 8), "1.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    name = "control_model.time_embedding.linear_"
    assert spare == {name + key: shape for key, shape in linear.items()}
    with pytest.warns(UserWarning, match="4 tensors are not used"):
        opened, found = load.load_model(tmp_path)
    assert opened == module
    assert_equal(jax.tree.map(np.asarray, found), params)


def test_the_older_class_had_type_b_alone():
    with pytest.raises(ConfigError, match="cannot hold control_type = 'A', use_linear"):
        layouts.to_research(tiny("A"))

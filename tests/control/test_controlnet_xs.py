"""ControlNet-XS: sizes, a fresh one changes nothing, connections, scales, sampling, conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import control, tree
from cnxs_jax.control import controlnet_xs
from cnxs_jax.control.controlled_unet import check_hint
from cnxs_jax.control.controlnet_xs import ControlNetXS
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import families, unet
from cnxs_jax.diffusion import guidance, sampling, schedule, solvers
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.unet import UNet
from tests.control.unets import BASE, BATCH, HINT_WIDTHS, base_params, inputs, perturbed, run
from tests.pipelines.tiny import filled

# (base, how it is sized, trained parameters, tensors): the adapters that were published.
PUBLISHED = {
    "sd21_14m": ("sd21", dict(size_ratio=0.0125, head_channels=8), 14_186_356, 402),
    "sd15_53m": ("sd15", dict(size_ratio=0.2), 52_661_392, 398),
    "sdxl_20m": ("sdxl", dict(size_ratio=0.05), 20_177_984, 882),
    "sdxl_48m": ("sdxl", dict(size_ratio=0.1), 42_424_368, 886),
}
CONNECTIONS = (r".*base_to_ctrl.*", r".*ctrl_to_base.*", r"control_to_base.*", r".*/conv_out/.*")
STAGES = BASE.num_stages
NO_FACTOR = {"conditioning_embedding_out_channels": (4,)}
# Level 0 has one channel a group, so that its norm takes away all that is constant in a channel.
CONSTANTS = r"down_blocks_0/resnets_0/(time_emb_proj/.*|conv1/bias)"


def adapter_of(control_type="B", infusion="cat", **fields):
    fields = HINT_WIDTHS | {"num_attention_heads": 2} | fields
    kind = {"control_type": control_type, "infusion": infusion}
    return controlnet_xs.from_unet(BASE, block_out_channels=(4, 6), **kind, **fields)


@pytest.fixture(scope="module")
def base():
    return base_params()


@pytest.fixture(scope="module")
def controlled(base):
    """(module, params) of adapters with noise everywhere and their own time embedding."""
    made = {}

    def get(*kind):
        if kind not in made:
            adapter = adapter_of(*kind, learn_time_embedding=True)
            own = perturbed(controlnet_xs.fresh_params(adapter, jax.random.key(1)))
            made[kind] = control.attach(BASE, base, adapter, own)
        return made[kind]

    return get


def shapes_of(adapter):
    family = families.family_of_module(adapter)
    return jax.eval_shape(adapter.init, jax.random.key(0), *family.example(adapter))["params"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    kind, size, parameters, tensors = PUBLISHED[name]
    expected = ControlNetXS(**layouts.PUBLISHED[name])
    learned = expected.learn_time_embedding
    base = UNet(**unet.PUBLISHED[kind])
    adapter = controlnet_xs.from_unet(base, learn_time_embedding=learned, **size)
    shapes = shapes_of(adapter)
    assert (tree.size(shapes), len(tree.flatten(shapes))) == (parameters, tensors)
    assert adapter.clone(upcast_attention=expected.upcast_attention) == expected
    assert adapter.hint_factor == 8


def test_size_of_type_a():
    """53 million parameters on SD 1.5, as the project page says."""
    base = UNet(**unet.PUBLISHED["sd15"])
    kind = {"control_type": "A", "learn_time_embedding": True}
    adapter = controlnet_xs.from_unet(base, size_ratio=0.2, **kind)
    assert tree.size(shapes_of(adapter)) == 52_736_272


def test_heads_of_small_controllers_are_wider_than_their_channels():
    """SD 1.5 at a tenth: 8 heads of 8 channels on 32, as the original builds it."""
    adapter = controlnet_xs.from_unet(UNet(**unet.PUBLISHED["sd15"]), size_ratio=0.1)
    assert (adapter.num_attention_heads, adapter.attention_head_width) == (8, (8, 8, 16, 16))
    wide = shapes_of(adapter_of().clone(attention_head_width=(3, 5)))
    assert wide["mid_block"]["midblock"]["attentions_0"]["proj_in"]["kernel"].shape == (1, 1, 6, 10)


@pytest.mark.parametrize(
    "kind",
    [
        ("B", "cat"),
        *(pytest.param(k, marks=pytest.mark.slow) for k in (("A", "cat"), ("C", "add"))),
    ],
)
def test_zero_connections_are_the_base_bit_for_bit(base, kind):
    """The rest of the adapter is noise: it computes something, and nothing of it arrives.

    Compiled at XLA's lowest level: above it two programs are fused in two ways, and their sums are
    taken in two orders (2e-8 here).
    """
    adapter = adapter_of(*kind)
    fresh = controlnet_xs.fresh_params(adapter, jax.random.key(1))
    module, params = control.attach(BASE, base, adapter, perturbed(fresh, keep=CONNECTIONS))
    args = inputs()

    def exact(module, params):
        program = jax.jit(lambda p, x, t, cond: module.apply({"params": p}, x, t, cond))
        options = {"xla_backend_optimization_level": "0"}
        return program.lower(params, *args).compile(compiler_options=options)(params, *args)

    np.testing.assert_array_equal(exact(module, params), exact(BASE, base))
    np.testing.assert_allclose(run(module, params, *args), run(BASE, base, *args), atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        ("B", "cat"),
        *(pytest.param(k, marks=pytest.mark.slow) for k in [("A", "add"), ("C", "cat")]),
    ],
)
def test_every_connection_of_the_type_counts(controlled, kind):
    """Type A has none in the encoder, type C none after the base's last stage."""
    module, params = controlled(*kind)
    x, t, cond = inputs()
    silent = {"A": set(range(STAGES)), "B": set(), "C": {2 * STAGES}}[kind[0]]
    whole = run(module, params, x, t, cond)
    assert whole.shape == x.shape
    for c in range(module.num_connections):
        scales = cond["connection_scale"].copy()
        scales[0, c] = 0.0
        out = run(module, params, x, t, {**cond, "connection_scale": scales})
        assert (np.abs(out[0] - whole[0]).max() > 1e-4) == (c not in silent), c
        np.testing.assert_allclose(out[1], whole[1], rtol=0, atol=1e-5)


def test_the_hint_is_embedded_once(controlled):
    """After `prepare` neither hint nor text is read; the embedder's weights neither."""
    module, params = controlled("B", "cat")
    x, t, cond = inputs()
    expected = run(module, params, x, t, cond)
    ready = jax.jit(sampling.denoiser(module).prepare)(params, cond)
    stale = {"hint": np.zeros_like(cond["hint"]), "text": np.zeros_like(cond["text"])}
    embedder = jax.tree.map(np.zeros_like, params["control"]["controlnet_cond_embedding"])
    without = {**params["control"], "controlnet_cond_embedding": embedder}
    out = run(module, {**params, "control": without}, x, t, {**ready, **stale})
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    changed = {**cond, "hint": cond["hint"].copy()}
    changed["hint"][1, -4:, -4:] = 1.0 - changed["hint"][1, -4:, -4:]  # the last corner arrives
    other = run(module, params, x, t, changed)
    np.testing.assert_allclose(other[0], expected[0], rtol=0, atol=1e-5)
    assert np.abs(other[1] - expected[1]).max() > 1e-4


def test_sampling_with_start_and_end_compiles_once(base, controlled):
    """Rows without control are the base's, learned time embedding or not; two halves guided."""
    module, params = controlled("B", "cat")
    x, _, cond = inputs()
    plain = {"null": {"text": 0.5 * cond["text"]}, "guidance_scale": jnp.full(BATCH, 3.0)}
    cond, plain = cond | plain, plain | {"text": cond["text"]}
    table = solvers.ddim(schedule.scaled_linear(0.00085, 0.012, 1000), 4)

    @jax.jit
    def sample(params, cond, table):
        return sampling.sample(guidance.cfg(sampling.denoiser(module)), params, x, cond, table)

    whole = sample(params, cond, table)
    half = sample(params, cond, table.with_control(0.0, 0.5))
    weak = sample(params, {**cond, "control_scale": np.full(BATCH, 0.3, np.float32)}, table)
    off = sample(params, cond, table.with_control(0.9, 0.95))
    assert sample._cache_size() == 1
    without = {k: v for k, v in cond.items() if k != "control_scale"}  # the same as 1
    one = sample(params, {**without, "control_scale": np.ones(BATCH, np.float32)}, table)
    np.testing.assert_allclose(sample(params, without, table), one, rtol=0, atol=1e-6)
    late = table.with_control(0.9, 0.95)
    np.testing.assert_allclose(sample(params, without, late), off, rtol=0, atol=1e-6)
    network = guidance.cfg(sampling.denoiser(BASE))
    none = jax.jit(lambda: sampling.sample(network, base, x, plain, table))()
    np.testing.assert_allclose(off, none, rtol=0, atol=1e-4)
    outputs = [whole, half, weak, off]
    for i, one in enumerate(outputs):
        assert all(np.abs(one - other).max() > 1e-2 for other in outputs[:i])


@pytest.mark.parametrize(
    ("compat", "learned", "same"),
    [
        ("official", False, {"control_scale", "connection_scale"}),
        ("official", True, {"control_scale"}),
        ("diffusers_pretrained", True, set()),
    ],
)
def test_which_zeros_are_no_control(base, compat, learned, same):
    """The table at the head of `controlnet_xs`, at 0; at 0.5 the official share is tied."""
    adapter = adapter_of(learn_time_embedding=learned)
    module, params = control.attach(BASE, base, adapter, filled(shapes_of(adapter)), compat)
    x, t, cond = inputs()
    cond["control_active"] = np.ones(BATCH, np.float32)

    def at(key, factor):
        return run(module, params, x, t, {**cond, key: factor * cond[key]})

    none, whole = at("control_active", np.float32(0)), at("control_active", np.float32(1))
    assert np.abs(whole - none).max() > 1e-2
    for key in ("control_scale", "connection_scale"):
        difference = np.abs(at(key, np.float32(0)) - none).max()
        assert difference <= 1e-6 if key in same else difference > 1e-3
    half = np.abs(at("control_scale", np.float32(0.5)) - at("connection_scale", np.float32(0.5)))
    assert (half.max() > 1e-4) == (learned and compat == "official")
    if compat == "official":
        np.testing.assert_allclose(none, run(BASE, base, x, t, cond), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_training_moves_the_adapter_alone(base):
    """Fresh: gradients only behind zeros that meet something; a step later everywhere."""
    adapter = adapter_of(learn_time_embedding=True)
    fresh = controlnet_xs.fresh_params(adapter, jax.random.key(1))
    module, params = control.attach(BASE, base, adapter, fresh)
    args = inputs()

    @jax.jit
    def gradient(own):
        def loss(own):
            out = module.apply({"params": {"base": base, "control": own}}, *args)
            return jnp.square(out - 1.0).mean()

        return jax.grad(loss)(own)

    own = params["control"]
    moving = moved(gradient(own))
    assert {path.split("/")[0] for path in moving} >= {"time_embedding", "up_connections_0"}
    assert not any("base_to_ctrl" in path or "cond_embedding" in path for path in moving)
    for _ in range(4):
        own = jax.tree.map(lambda p, g: p - 0.3 * g, own, gradient(own))
    still = set(tree.flatten(own)) - set(moved(gradient(own)))
    assert all(tree.matches(CONSTANTS, path) for path in still), still


def moved(gradients):
    return [path for path, g in tree.flatten(gradients).items() if np.abs(g).max() > 0]


def test_init_makes_both_trees(controlled):
    module, params = controlled("C", "cat")
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs())["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)


def test_equal_modules_share_a_compiled_program(base):
    made = [control.attach(BASE, base, adapter_of(), {})[0] for _ in range(2)]
    one, two = (sampling.denoiser(module) for module in made)
    assert one == two
    assert hash(one) == hash(two)
    for other in ("diffusers", "diffusers_pretrained"):
        assert sampling.denoiser(control.attach(BASE, base, adapter_of(), {}, other)[0]) != one
    module = made[0]
    assert (module.hint_factor, module.hint_kind, module.in_channels) == (2, "image", 4)


@pytest.mark.parametrize(
    ("adapter", "compat", "words"),
    [
        (adapter_of(), "oficial", 'Did you mean "official"'),
        (adapter_of("C"), "diffusers", "only type B"),
        (adapter_of(infusion="add"), "diffusers", "only type B"),
        (ControlNetXS(), "official", r"another base: base_block_out_channels \(320, 640"),
        (adapter_of().clone(cross_attention_dim=9), "official", "cross_attention_dim 9, of the"),
        (
            [adapter_of(), adapter_of(conditioning_embedding_out_channels=(4,))],
            "official",
            "factors",
        ),
    ],
)
def test_misfits(adapter, compat, words):
    params = [{}, {}] if isinstance(adapter, list) else {}
    with pytest.raises(ConfigError, match=words):
        control.attach(BASE, {}, adapter, params, compat)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(control_type="D"), "control_type = 'D'"),
        (dict(infusion="mul"), "infusion"),
        (dict(block_out_channels=(0, 6)), r"block_out_channels = \(0, 6\), expected 2 positive"),
        (dict(conditioning_channel_order="rbg"), "conditioning_channel_order"),
        (dict(num_attention_heads=(1, 2, 3)), "expected 2 positive"),
        (dict(num_attention_heads=5), "5 attention heads on 4 channels"),
        (dict(base_block_out_channels=(8,)), "base_block_out_channels"),
        (dict(sample_size=(8, 8, 3)), r"sample_size = \(8, 8, 3\)"),
        (dict(time_embedding_mix=0.5), "needs learn_time_embedding"),
        (dict(time_embedding_mix=1.5, learn_time_embedding=True), "expected 0 to 1"),
    ],
)
def test_bad_configs(changes, words):
    with pytest.raises(ConfigError, match=words):
        shapes_of(adapter_of().clone(**changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hint": None}, "0 hints for 1"),
        ({"hint": (jnp.zeros((2, 6, 10, 3)),)}, "hints for 1 adapters"),
        ({"hint": jnp.zeros((2, 6, 10, 4))}, r"expected \[B,H,W,3\]"),
        ({"hint": jnp.zeros((2, 6, 6, 3))}, "6x6 pixels for latents of 3x5"),
        ({"hint": jnp.zeros((2, 6, 10, 3), jnp.uint8)}, "uint8, expected floats"),
        ({"control_scale": (jnp.ones(2),) * 2}, "adapters"),
        ({"hint": jnp.zeros((3, 6, 10, 3))}, "a hint of batch 3 for latents of batch 2"),
        ({"control_scale": 1.0}, r"shape \[\], expected \[2\] \[cond\["),
        ({"control_scale": jnp.ones(())}, r"shape \[\], expected \[2\]"),
        ({"control_scale": jnp.ones(3)}, r"(?s)shape \[3\], expected \[2\].*one number an image"),
        ({"control_active": jnp.ones((2, 1))}, r"shape \[2, 1\], expected \[2\]"),
        ({"connection_scale": jnp.ones((2, 3))}, r"(?s)shape \[2, 3\], expected \[2, 9\].*middle"),
        ({"connection_scale": jnp.ones(9)}, r"shape \[9\], expected \[2, 9\]"),
        ({"connection_scale": jnp.ones((3, 9))}, r"shape \[3, 9\], expected \[2, 9\]"),
    ],
)
def test_bad_conditions(base, change, words):
    adapter = adapter_of()
    own = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes_of(adapter))
    module, params = control.attach(BASE, base, adapter, own)
    x, t, cond = inputs()
    with pytest.raises(ConfigError, match=words):
        jax.eval_shape(module.apply, {"params": params}, x, t, {**cond, **change})


def test_one_row_of_conditions_serves_the_batch(controlled):
    module, params = controlled("B", "cat")
    x, t, cond = inputs()
    cond["hint"][1] = cond["hint"][0]
    one = {k: cond[k][:1] for k in ("hint", "control_scale", "connection_scale")}
    found = run(module, params, x, t, cond | one)
    np.testing.assert_allclose(found, run(module, params, x, t, cond), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({}, "either size_ratio or block_out_channels"),
        ({"size_ratio": -1}, "size_ratio = -1, expected a positive number"),
        ({"size_ratio": 0.0}, "size_ratio = 0.0"),
        ({"size_ratio": float("nan")}, "size_ratio = nan"),
        ({"size_ratio": "0.1"}, "size_ratio = '0.1'"),
        ({"block_out_channels": (0, 6)}, r"block_out_channels = \(0, 6\), expected 2 positive"),
        ({"block_out_channels": (4,)}, "expected 2 positive numbers"),
        ({"block_out_channels": (4.0, 6)}, "expected 2 positive numbers"),
        ({"size_ratio": 0.5, "head_channels": -1}, "head_channels = -1"),
    ],
)
def test_sizes_that_cannot_be(sizes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        controlnet_xs.from_unet(BASE, **sizes)
    assert caught.value.where == "controlnet_xs.from_unet"


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 255.0), (0.0, np.nan)])
def test_hints_outside_of_their_range(values):
    hint = np.zeros((1, 2, 2, 3), np.float32)
    hint[0, 0, 0, :2] = values
    with pytest.raises(ConfigError, match=r"values reach from .* expected \[0, 1\]"):
        check_hint(hint)


def test_channel_order_is_that_of_the_config(controlled):
    """An adapter trained on BGR pictures takes RGB ones like any other."""
    module, params = controlled("B", "cat")
    x, t, cond = inputs()
    flipped = {**cond, "hint": cond["hint"][..., ::-1]}
    bgr = module.clone(control=module.control.clone(conditioning_channel_order="bgr"))
    out = run(bgr, params, x, t, flipped)
    np.testing.assert_allclose(out, run(module, params, x, t, cond), rtol=0, atol=1e-6)

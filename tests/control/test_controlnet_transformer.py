"""ControlNet-Transformer: a fresh one changes nothing, where its residuals go, its conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import control
from cnxs_jax.control import controlnet_transformer
from cnxs_jax.control.controlnet_transformer import ControlNetTransformer, from_base
from cnxs_jax.diffusion import guidance, sampling
from cnxs_jax.errors import ConfigError
from cnxs_jax.models import dit
from cnxs_jax.models.dit import PixArt

DEPTH, BATCH = 4, 2
BASE = PixArt(
    num_layers=DEPTH,
    num_attention_heads=2,
    attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=10,
    sample_size=8,
)
ORDERS = [("released", 1), ("released", 3), ("paper", 1), ("paper", 4), ("unet", 2)]


@pytest.fixture
def scanned(monkeypatch):
    """Loops as a large network has them, which also compile faster than unrolled ones."""
    for module in (dit, controlnet_transformer):
        monkeypatch.setattr(module, "unrolled", lambda num_layers, features: 1)


def adapter_of(order="released", num_layers=2):
    return ControlNetTransformer(num_layers, 2, 12, order)


def perturbed(params, seed=0):
    """Every leaf nonzero, so that no part is silent."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noise = [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, noise)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x, hint = (rng.normal(size=(BATCH, 8, 8, 4)).astype(np.float32) for _ in range(2))
    text = rng.normal(size=(BATCH, 5, 10)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    return jnp.asarray(x), jnp.array([3, 700]), {"text": text, "text_mask": mask, "hint": hint}


@pytest.fixture(scope="module")
def base_params(inputs):
    init = jax.jit(BASE.init)(jax.random.key(0), *inputs)["params"]
    return perturbed(init)


def run(module, params, x, t, cond):
    return np.asarray(jax.jit(module.apply)({"params": params}, x, t, cond))


@pytest.mark.parametrize(("order", "num_layers"), ORDERS)
def test_a_fresh_adapter_is_the_base_bit_for_bit(inputs, base_params, order, num_layers):
    fresh = from_base(base_params, num_layers)
    module, params = control.attach(BASE, base_params, adapter_of(order, num_layers), fresh)
    np.testing.assert_array_equal(run(module, params, *inputs), run(BASE, base_params, *inputs))


def test_orders_differ_and_control_scale_acts_on_its_image_alone(scanned, inputs, base_params):
    x, t, cond = inputs
    plain = run(BASE, base_params, x, t, cond)
    adapter = perturbed(from_base(base_params, 2))
    outputs = {}
    for order in ("released", "paper", "unet"):
        module, params = control.attach(BASE, base_params, adapter_of(order), adapter)
        scaled = {**cond, "control_scale": jnp.array([0.0, 1.0])}
        outputs[order] = run(module, params, x, t, scaled)
        np.testing.assert_allclose(outputs[order][0], plain[0], rtol=0, atol=1e-5)
    seconds = [plain[1]] + [out[1] for out in outputs.values()]
    for i, one in enumerate(seconds):
        assert all(np.abs(one - other).max() > 1e-2 for other in seconds[:i])


def test_prepared_and_guided(scanned, inputs, base_params):
    """`prepare` before the loop changes nothing, and guidance controls both halves."""
    x, t, cond = inputs
    module, params = control.attach(
        BASE, base_params, adapter_of(), perturbed(from_base(base_params, 2))
    )
    denoise = sampling.denoiser(module)
    cond = {**cond, "control_scale": jnp.array([0.5, 1.5]), "guidance_scale": jnp.full(2, 3.0)}
    null = {"text": 0.3 * cond["text"]}
    guided = guidance.cfg(denoise)

    @jax.jit
    def both(params):
        whole = {**cond, "null": null}
        ready = guided.prepare(params, whole)
        return guided(params, x, t, whole), guided(params, x, t, ready)

    one, two = both(params)
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
    plain = {k: v for k, v in cond.items() if k != "guidance_scale"}
    c, u = (run(module, params, x, t, plain | other)[..., : x.shape[-1]] for other in ({}, null))
    np.testing.assert_allclose(one, u + 3.0 * (c - u), rtol=0, atol=2e-5)


def test_several_adapters_add_up(scanned, inputs, base_params):
    """Two half-scaled copies of one adapter are that adapter; scales are told apart."""
    x, t, cond = inputs
    adapter = perturbed(from_base(base_params, 2))
    other = perturbed(from_base(base_params, 2), seed=5)
    kind = adapter_of(num_layers=2)
    module, params = control.attach(BASE, base_params, kind, adapter)
    expected = run(module, params, x, t, cond)
    two, both = control.attach(BASE, base_params, [kind, kind], [adapter, other])
    assert set(both["control"]) == {"adapters_0", "adapters_1"}
    scales = (jnp.ones(BATCH), jnp.zeros(BATCH))
    pair = {**cond, "hint": (cond["hint"], -cond["hint"]), "control_scale": scales}
    np.testing.assert_allclose(run(two, both, x, t, pair), expected, rtol=0, atol=1e-5)
    pair = {**pair, "control_scale": scales[::-1]}
    assert np.abs(run(two, both, x, t, pair) - expected).max() > 1e-2


def test_training_moves_the_control_alone(scanned, inputs, base_params):
    """The zero linears get gradients at once, the copies behind them once those have moved."""
    module, params = control.attach(BASE, base_params, adapter_of(), from_base(base_params, 2))

    @jax.jit
    def gradient(own):
        def loss(own):
            out = module.apply({"params": {"base": base_params, "control": own}}, *inputs)
            return jnp.square(out - 1.0).mean()

        return jax.grad(loss)(own)

    first = gradient(params["control"])
    assert (np.abs(first["controlnet_blocks"]["after_proj"]["kernel"]).max(axis=(1, 2)) > 0).all()
    assert np.abs(first["before_proj"]["kernel"]).max() == 0
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params["control"], first)
    second = gradient(moved)
    assert np.abs(second["before_proj"]["kernel"]).max() > 0
    copied = second["controlnet_blocks"]["transformer_block"]["attn1"]["to_q"]["kernel"]
    assert (np.abs(copied).max(axis=(1, 2)) > 0).all()


def test_init_makes_both_trees(inputs, base_params):
    module, params = control.attach(BASE, base_params, adapter_of(), from_base(base_params, 2))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)


@pytest.mark.parametrize("order", ["released", "paper", "unet"])
def test_published_size(order):
    """294,917,760 trainable parameters (13 blocks of XL/2), as PixArt-delta's code counts."""
    base = PixArt(sample_size=64)
    x, t = jnp.zeros((1, 64, 64, 4)), jnp.zeros(1)
    cond = {"text": jnp.zeros((1, 120, 4096)), "text_mask": jnp.ones((1, 120)), "hint": x}
    target = jax.eval_shape(base.init, jax.random.key(0), x, t, cond)["params"]
    copies = jax.eval_shape(from_base, target)
    assert sum(leaf.size for leaf in jax.tree.leaves(copies)) == 294_917_760
    module, params = control.attach(base, target, ControlNetTransformer(order=order), copies)
    out = jax.eval_shape(module.apply, {"params": params}, x, t, cond)
    assert (out.shape, out.dtype) == ((1, 64, 64, 8), jnp.float32)


def test_equal_modules_share_a_compiled_program(base_params):
    """Wrapped twice, the denoisers are equal: as static arguments they do not recompile."""
    made = [control.attach(BASE, base_params, adapter_of(), {})[0] for _ in range(2)]
    one, two = (sampling.denoiser(module) for module in made)
    assert one == two
    assert hash(one) == hash(two)
    other = control.attach(BASE, base_params, adapter_of("paper"), {})[0]
    assert sampling.denoiser(other) != one
    assert (made[0].sample_size, made[0].in_channels, made[0].hint_kind) == (8, 4, "latents")


@pytest.mark.parametrize(
    ("adapter", "compat", "words"),
    [
        (ControlNetTransformer(5, 2, 12), "official", "the base of 4 takes 4"),
        (ControlNetTransformer(3, 2, 12, "unet"), "official", "takes 2"),
        (ControlNetTransformer(2, 4, 6), "official", "num_attention_heads 4"),
        (ControlNetTransformer(2, 2, 12), "diffusers", "field `order`"),
        ([ControlNetTransformer(n, 2, 12) for n in (1, 2)], "official", "different order"),
    ],
)
def test_misfits(adapter, compat, words):
    params = [{}, {}] if isinstance(adapter, list) else {}
    with pytest.raises(ConfigError, match=words):
        control.attach(BASE, {}, adapter, params, compat)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hint": None}, "0 hints for 1"),
        ({"hint": (jnp.zeros((2, 8, 8, 4)),)}, "hints for 1 adapters"),
        ({"hint": jnp.zeros((2, 8, 8, 3))}, "a hint of 3 channels"),
        ({"hint": jnp.zeros((2, 4, 4, 4))}, "a hint of 4x4"),
        ({"hint": jnp.zeros((3, 8, 8, 4))}, "a hint of batch 3 for latents of batch 2"),
        ({"control_scale": jnp.ones(())}, r"shape \[\], expected \[2\]"),
        ({"control_scale": (jnp.ones(2),)}, "1 values for 1 adapters"),
    ],
)
def test_bad_conditions(inputs, base_params, change, words):
    module, params = control.attach(BASE, base_params, adapter_of(), from_base(base_params, 2))
    x, t, cond = inputs
    with pytest.raises(ConfigError, match=words):
        jax.eval_shape(module.apply, {"params": params}, x, t, {**cond, **change})


def test_unknown_order(inputs):
    with pytest.raises(ConfigError, match='Did you mean "paper"'):
        control.attach(BASE, {}, adapter_of("papers"), {})

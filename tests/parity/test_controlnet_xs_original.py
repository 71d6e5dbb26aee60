"""ControlNet-XS against the original code: CNXS_ORIGINAL_XS=CHECKOUT pytest tests/parity/...

Runs only where a checkout of vislearn/ControlNet-XS is named; `test_controlnet_xs` states the same
arithmetic without it, for the types that diffusers has.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cnxs_jax import control, tree
from cnxs_jax.control import controlnet_xs
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import families, rules, unet
from cnxs_jax.models.layers import sinusoid
from cnxs_jax.models.unet import UNet
from tests import checks
from tests.parity import full_size, original_xs
from tests.parity.helpers import nhwc, perturb, relative_error

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not original_xs.PATH, reason="CNXS_ORIGINAL_XS names no checkout"),
]

SHARED = dict(block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=12)
BASES = {
    "ldm": UNet(
        **SHARED,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "sgm": UNet(
        **SHARED,
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=10 + 6 * 6,
    ),
}
GUIDING = {"A": "encoder", "B": "encoder_double", "C": "full"}
CASES = [
    ("ldm", "A", "cat", True),
    ("ldm", "B", "cat", True),
    ("ldm", "B", "add", False),
    ("ldm", "C", "cat", False),
    ("ldm", "C", "add", True),
    ("sgm", "B", "cat", True),
]


def pair(package, kind, infusion, learn):
    """(controller, base, our module, our parameters), every parameter perturbed."""
    torch.manual_seed(0)
    net, base = original_xs.make(package, 0.25, learn, GUIDING[kind], infusion)
    perturb(net)
    if package == "ldm":
        perturb(base, seed=1)
    ours = BASES[package]
    family = families.family_of_module(ours)
    target = jax.eval_shape(ours.init, jax.random.key(0), *family.example(ours))["params"]
    base_params = rules.to_params(numbers(base.state_dict()), target, unet.ldm(ours))
    adapter = controlnet_xs.from_unet(
        ours, 0.25, learn_time_embedding=learn, control_type=kind, infusion=infusion
    )
    family = families.family_of_module(adapter)
    target = jax.eval_shape(adapter.init, jax.random.key(0), *family.example(adapter))["params"]
    tensors = {k: v for k, v in net.state_dict().items() if not k.startswith("diffusion_model.")}
    own = rules.to_params(numbers(tensors), target, layouts.official(adapter))
    return net, base, *control.attach(ours, base_params, adapter, own)


def numbers(tensors):
    return {key: value.numpy() for key, value in tensors.items()}


def inputs(package):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    hint = rng.uniform(size=(2, 32, 32, 3)).astype(np.float32)
    cond = {"text": normal(2, 5, 12), "hint": hint}
    if package == "sgm":
        cond |= {"pooled": normal(2, 10), "time_ids": rng.integers(0, 99, (2, 6)).astype("f4")}
    return normal(2, 4, 4, 4), np.array([3, 907]), cond


def original(net, base, x, t, cond, scale, tied=True):
    """Scaled as the script for SDXL does: the connections and, with them, the time embedding.

    `tied` False: the connections alone, as the script for SD does.
    """
    net.control_scale, net.scale_list = (
        scale if tied else 1.0,
        torch.full_like(net.scale_list, scale),
    )
    x, hint = (torch.tensor(a).permute(0, 3, 1, 2) for a in (x, cond["hint"]))
    t, text = torch.tensor(t), torch.tensor(cond["text"])
    if "pooled" not in cond:
        return net(x, hint, t, text, base)
    ids = sinusoid(jnp.asarray(cond["time_ids"]).reshape(-1), 6).reshape(2, -1)
    y = torch.tensor(np.concatenate([cond["pooled"], np.asarray(ids)], axis=-1))
    return net.forward_(x, hint, t, text, y=y)


@pytest.mark.parametrize(("package", "kind", "infusion", "learn"), CASES)
def test_forward_and_gradients(package, kind, infusion, learn):
    net, base, module, params = pair(package, kind, infusion, learn)
    x, t, cond = inputs(package)
    expected = original(net, base, x, t, cond, 0.7)
    expected.square().mean().backward()
    scaled = {**cond, "control_scale": np.full(2, 0.7, np.float32)}

    def loss(own):
        out = module.apply({"params": {**params, "control": own}}, x, t, scaled)
        return jnp.square(out).mean(), out

    with jax.default_matmul_precision("highest"):
        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params["control"])
    assert relative_error(out, nhwc(expected)) <= 1e-5
    grads = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    own = {k: g.numpy() for k, g in grads.items() if not k.startswith("diffusion_model.")}
    table = layouts.official(module.control)
    theirs = tree.flatten(rules.to_params(own, params["control"], table))
    errors, where = full_size.gradient_errors(tree.flatten(gradient), theirs)
    assert errors["gradient_error"] <= 1e-4, where
    assert errors.get("zero_gradient", 0.0) <= 1e-6


@pytest.mark.parametrize("package", ["ldm", "sgm"])
def test_scales_of_both_scripts_and_no_control(package):
    """With a learned time embedding: see the table at the head of `controlnet_xs`."""
    net, base, module, params = pair(package, "B", "cat", True)
    x, t, cond = inputs(package)
    ones = np.ones((2, module.num_connections), np.float32)
    cond |= {"control_scale": ones[:, 0], "control_active": ones[:, 0], "connection_scale": ones}
    run = jax.jit(lambda cond: module.apply({"params": params}, x, t, cond))
    found = {}
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        for key, tied in (("control_scale", True), ("connection_scale", False)):
            for scale in (0.7, 0.0):
                expected = nhwc(original(net, base, x, t, cond, scale, tied))
                found[key, scale] = run({**cond, key: np.float32(scale) * cond[key]})
                assert relative_error(found[key, scale], expected) <= 1e-5
        net.no_control = True
        none = nhwc(original(net, base, x, t, cond, 1.0))
        assert relative_error(run({**cond, "control_active": 0 * ones[:, 0]}), none) <= 1e-5
    assert relative_error(found["control_scale", 0.0], none) <= 1e-5
    assert relative_error(found["connection_scale", 0.0], none) > 1e-2
    assert relative_error(found["connection_scale", 0.7], found["control_scale", 0.7]) > 1e-3


@pytest.mark.parametrize("name", original_xs.PUBLISHED)
def test_names_and_shapes_of_the_published_sizes(name):
    theirs = original_xs.published(name)
    family = families.family_of({"_class_name": "ControlNetXSAdapter"}, "config")
    module, target = families.build(family, layouts.PUBLISHED[name], "config")
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), target)
    ours = {k: v.shape for k, v in layouts.official_tensors(module, empty).items()}
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15_53m", "sd21_14m"])
def test_forward_and_gradients_of_the_published_sizes(name):
    """At full width, weights drawn, the zero convolutions too; some minutes and 13 GB each."""
    package, sizes, ratio, learn = original_xs.PUBLISHED[name]
    with torch.device("meta"):
        wider = original_xs.SD21_BASE if name == "sd21_14m" else None  # heads of the base
        net, base = original_xs.make(package, ratio, learn, sizes=sizes, base=wider)
    # The base keeps its gradients: the original's checkpoints ask for them.
    net, base = (
        full_size.on_meta(lambda made=made: made, seed=i) for i, made in enumerate((net, base))
    )
    x, t, cond, _ = full_size.controlled_inputs(name, full_size.SIZE, 0.7)
    out = original(net, base, x, t, cond, 0.7)
    out.square().mean().backward()
    expected = nhwc(out).copy()
    grads = {k: p.grad.numpy() for k, p in net.named_parameters() if p.grad is not None}
    config = unet.PUBLISHED[full_size.BASES[name]]
    ldm = unet.ldm(UNet(**config))
    ours = full_size.ours("UNet2DConditionModel", config, numbers(base.state_dict()), ldm)
    config = layouts.PUBLISHED[name]
    table = layouts.official(controlnet_xs.ControlNetXS(**config))
    ours += full_size.ours("ControlNetXSAdapter", config, numbers(net.state_dict()), table)
    module, params = control.attach(*ours, "official")
    del net, base, out
    full_size.free()

    def loss(own, base):
        out = module.apply({"params": {"base": base, "control": own}}, x, t, cond)
        return jnp.square(out).mean(), out

    with jax.default_matmul_precision("highest"):
        run = jax.jit(jax.grad(loss, has_aux=True))
        found, out = run(params["control"], params["base"])
    error = relative_error(out, expected)
    theirs = tree.flatten(rules.to_params(grads, params["control"], table))
    gradients, where = full_size.gradient_errors(tree.flatten(found), theirs)
    figures = {"relative_error": float(error), **gradients}
    print(f"{name}: {figures}, worst gradient {where}")
    checks.record(f"ControlNet-XS {name} against the original code", **figures)
    assert error <= 1e-5
    assert gradients["gradient_error"] <= 1e-4
    assert gradients.get("zero_gradient", 0.0) <= 1e-6

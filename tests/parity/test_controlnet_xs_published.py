"""The published ControlNet-XS at full width against diffusers' fused model; all of it is slow.

Weights are drawn, the zero convolutions too. Beside the original code: `_original`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cnxs_jax import control, tree
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import controlnet_xs_fused as fused_layout
from cnxs_jax.convert import rules, unet
from tests import checks
from tests.parity import full_size, xs_models
from tests.parity.helpers import nhwc, relative_error

pytestmark = [pytest.mark.parity, pytest.mark.slow]

SCALE = 0.8


def networks_of(name, model):
    """Base and adapter, module and parameters of each, from diffusers' `model`."""
    parts = fused_layout.split(full_size.arrays(model.state_dict()))
    config = unet.PUBLISHED[full_size.BASES[name]]
    base = full_size.ours("UNet2DConditionModel", config, parts["unet"])
    adapter = full_size.ours("ControlNetXSAdapter", layouts.PUBLISHED[name], parts["controlnet"])
    return *base, *adapter


def differentiated(model, arguments):
    """(output NHWC, {name: gradient}) of the mean square."""
    model.zero_grad()
    out = model(**arguments).sample
    out.square().mean().backward()
    named = model.named_parameters()
    return nhwc(out).copy(), {k: p.grad.numpy().copy() for k, p in named if p.grad is not None}


def as_ours(grads, like):
    """{path: gradient} of diffusers' gradients, as the parameters `like` have them."""
    named, unknown = rules.to_diffusers(
        grads, fused_layout.TABLES["controlnet"], rules.Problems("gradients")
    )
    assert not unknown
    return tree.flatten(rules.to_params({k: g for k, (_, g) in named.items()}, like))


@pytest.mark.parametrize("name", ["sd15_53m", "sd21_14m"])
def test_forward_and_gradients_of_the_adapter(name):
    """Some minutes and 15 GB each.

    Gradients are those of PyTorch in float64: some are sums that cancel, of which its float32 has
    less than four digits (`PyTorch's own error` of the figures).
    """
    x, t, cond, arguments = full_size.controlled_inputs(name, full_size.SIZE, SCALE)
    model = full_size.on_meta(lambda: full_size.fused(name, "diffusers"))
    model.freeze_unet_params()
    expected, single = differentiated(model, arguments)
    module, params = control.attach(*networks_of(name, model), "diffusers")
    params = jax.tree.map(np.array, params)  # the tensors become wider now
    model.double()
    doubled = {k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()}
    _, grads = differentiated(model, doubled)
    del model
    full_size.free()

    def loss(own, base):
        out = module.apply({"params": {"base": base, "control": own}}, x, t, cond)
        return jnp.square(out).mean(), out

    with jax.default_matmul_precision("highest"):
        run = jax.jit(jax.grad(loss, has_aux=True))
        found, out = run(params["control"], params["base"])
    error = relative_error(out, expected)
    exact, single = (as_ours(g, params["control"]) for g in (grads, single))
    gradients, where = full_size.gradient_errors(tree.flatten(found), exact)
    own, _ = full_size.gradient_errors(single, exact)
    figures = {"relative_error": float(error), **gradients}
    figures["PyTorch's own error"] = own["gradient_error"]
    print(f"{name}: {figures}, worst gradient {where}")
    checks.record(f"ControlNet-XS {name} against diffusers", **figures)
    assert error <= 1e-5
    assert gradients["gradient_error"] <= 1e-4
    assert gradients.get("zero_gradient", 0.0) <= 1e-6


@pytest.mark.parametrize("name", ["sdxl_20m", "sdxl_48m"])
def test_forward_of_sdxl(name):
    """Weights rounded to bfloat16 on both sides, float32 arithmetic; ten minutes and 12 GB.

    "official" is diffusers' model with its norms corrected and the scale in its mix. Ours runs
    without `jit`, under which all weights would be widened at once.
    """
    x, t, cond, arguments = full_size.controlled_inputs(name, full_size.XL_SIZE, SCALE)
    model = full_size.on_meta(lambda: full_size.fused(name, "diffusers"), torch.bfloat16)
    adapter, expected = layouts.PUBLISHED[name], {}
    with torch.no_grad(), full_size.computed_in_float32(model):
        expected["diffusers"] = nhwc(model(**arguments).sample).copy()
        xs_models.correct_norms(model, adapter.get("max_norm_num_groups", 32))
        model.register_to_config(time_embedding_mix=SCALE * model.config.time_embedding_mix)
        expected["official"] = nhwc(model(**arguments).sample).copy()
    networks = networks_of(name, model)
    del model
    full_size.free()
    errors = {}
    for compat, theirs in expected.items():
        module, params = control.attach(*networks, compat)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
        with jax.default_matmul_precision("highest"):
            found = module.apply({"params": params}, x, t, cond)
        errors[f"relative_error, {compat}"] = float(relative_error(found, theirs))
    apart = relative_error(expected["official"], expected["diffusers"])
    print(f"{name}: {errors}; the two references are {apart:.1e} apart")
    checks.record(f"ControlNet-XS {name} against diffusers", **errors)
    assert max(errors.values()) <= 1e-5
    assert apart > 2e-5

"""What control costs, by the FLOP walker: an evaluation, and a train step with a frozen base."""

import jax
import jax.numpy as jnp
import pytest

from cnxs_jax import control, tree
from cnxs_jax.control import controlnet, controlnet_xs
from cnxs_jax.control.controlnet_xs import ControlNetXS
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import families, unet
from cnxs_jax.diffusion import sampling
from cnxs_jax.models.unet import UNet
from eval import flops
from tests import checks
from tests.control.unets import BASE, HINT_WIDTHS, inputs


def shapes_of(module):
    family = families.family_of_module(module)
    return jax.eval_shape(module.init, jax.random.key(0), *family.example(module))["params"]


def counted(fn, *args):
    """FLOPs of the lowered program; nothing is compiled or computed."""
    return flops.count(jax.jit(fn).lower(*args))


def evaluation(module, params, x, t, cond):
    """FLOPs of one evaluation with what `prepare` makes given."""
    denoise = sampling.denoiser(module)
    ready = jax.eval_shape(denoise.prepare, params, cond)
    return counted(denoise, params, x, t, ready)


def test_a_train_step_computes_no_gradient_of_the_base():
    """Forward, the way back through the base's activations, and forward and twice of the adapter.

    A gradient of the base's weights would cost nearly another forward of the base: the second
    program has it.
    """
    adapter = controlnet_xs.from_unet(
        BASE, block_out_channels=(4, 6), num_attention_heads=2, **HINT_WIDTHS
    )
    base, own = shapes_of(BASE), shapes_of(adapter)
    module, _ = control.attach(BASE, base, adapter, own)
    x, t, cond = inputs()

    def loss(own, base):
        out = module.apply({"params": {"base": base, "control": own}}, x, t, cond)
        return jnp.square(out).mean()

    def plain(base):
        return jnp.square(BASE.apply({"params": base}, x, t, cond)).mean()

    forward, alone = counted(loss, own, base), counted(plain, base)
    step = counted(jax.grad(loss), own, base)
    both = counted(jax.grad(loss, argnums=(0, 1)), own, base)
    assert step <= 1.05 * (forward + alone + 2 * (forward - alone))
    assert both >= step + 0.6 * alone


@pytest.mark.slow
def test_cost_beside_sdxl_at_1024():
    """One evaluation, 128x128 latents: ControlNet-XS at most 3 % above the base; ControlNet 45."""
    base = UNet(**unet.PUBLISHED["sdxl"])
    adapters = {
        "ControlNet-XS 48M": ControlNetXS(**layouts.PUBLISHED["sdxl_48m"]),
        "ControlNet-XS 20M": ControlNetXS(**layouts.PUBLISHED["sdxl_20m"]),
        "ControlNet": controlnet.from_unet(base),
    }
    shape, params = jax.ShapeDtypeStruct, shapes_of(base)
    x, t = shape((1, 128, 128, 4), jnp.float32), shape((1,), jnp.int32)
    cond = {
        "text": shape((1, 77, 2048), jnp.float32),
        "pooled": shape((1, 1280), jnp.float32),
        "time_ids": shape((1, 6), jnp.float32),
    }
    alone = evaluation(base, params, x, t, cond)
    cond["hint"] = shape((1, 1024, 1024, 3), jnp.float32)
    found = {}
    for name, adapter in adapters.items():
        module, both = control.attach(base, params, adapter, shapes_of(adapter))
        found[name] = evaluation(module, both, x, t, cond) / alone - 1
    trained = {name: tree.size(shapes_of(adapter)) for name, adapter in adapters.items()}
    checks.record(
        "cost of control on SDXL at 1024 px",
        base_gflop=round(alone / 1e9),
        **{f"{name}, percent more": round(100 * share, 2) for name, share in found.items()},
        **{f"{name}, parameters": count for name, count in trained.items()},
    )
    assert found["ControlNet-XS 48M"] <= 0.03
    assert found["ControlNet-XS 20M"] <= 0.03
    assert 0.42 <= found["ControlNet"] <= 0.48

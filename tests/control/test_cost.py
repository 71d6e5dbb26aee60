"""What control costs, by the FLOP walker: an evaluation, and a train step with a frozen base."""

import jax
import jax.numpy as jnp
import pytest

from cnxs_jax import control, tree
from cnxs_jax.control import controlnet, controlnet_xs
from cnxs_jax.control.controlnet_xs import ControlNetXS
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import families, unet
from cnxs_jax.diffusion import sampling, schedule, solvers
from cnxs_jax.models.unet import UNet
from eval import flops
from tests import checks
from tests.control.unets import BASE, BATCH, HINT_WIDTHS, inputs


def shapes_of(module):
    family = families.family_of_module(module)
    return jax.eval_shape(module.init, jax.random.key(0), *family.example(module))["params"]


def counted(fn, *args):
    """FLOPs of the lowered program; nothing is compiled or computed."""
    return flops.count(jax.jit(fn).lower(*args))


def preparation(module, params, cond):
    """FLOPs of what the steps share: the hint's features, the text's keys and values."""
    return counted(sampling.denoiser(module).prepare, params, cond)


def evaluation(module, params, x, t, cond):
    """FLOPs of one evaluation with what `prepare` makes given."""
    denoise = sampling.denoiser(module)
    ready = jax.eval_shape(denoise.prepare, params, cond)
    return counted(denoise, params, x, t, ready)


def sampling_loop(module, params, x, cond, steps):
    """FLOPs of the whole loop, preparation and all its trips."""
    table = solvers.ddim(schedule.scaled_linear(0.00085, 0.012, 1000), steps)

    def sample(params, x, cond, table):
        return sampling.sample(sampling.denoiser(module), params, x, cond, table)

    return counted(sample, params, x, cond, table)


def train_step(base, module, own, frozen, x, t, cond):
    """FLOPs {forward, base, step, both}: `step` has the gradient of the adapter, `both` of all."""

    def loss(own, frozen):
        out = module.apply({"params": {"base": frozen, "control": own}}, x, t, cond)
        return jnp.square(out).mean()

    def plain(frozen):
        return jnp.square(base.apply({"params": frozen}, x, t, cond)).mean()

    return {
        "forward": counted(loss, own, frozen),
        "base": counted(plain, frozen),
        "step": counted(jax.grad(loss), own, frozen),
        "both": counted(jax.grad(loss, argnums=(0, 1)), own, frozen),
    }


def unavoidable(flop):
    """FLOPs of a train step with a frozen base: base forward, the way back through its activations
    (as much again: every product has one gradient instead of two), adapter forward and twice back.
    """
    adapter = flop["forward"] - flop["base"]
    return 2 * flop["base"] + 3 * adapter


def tiny():
    """(module, base's shapes, adapter's shapes) of a ControlNet-XS on the tiny UNet."""
    adapter = controlnet_xs.from_unet(
        BASE, block_out_channels=(4, 6), num_attention_heads=2, **HINT_WIDTHS
    )
    base, own = shapes_of(BASE), shapes_of(adapter)
    return control.attach(BASE, base, adapter, own)[0], base, own


def test_a_train_step_computes_no_gradient_of_the_base():
    """A gradient of the base's weights would cost nearly another forward of the base: the second
    program has it. The way back ends where control begins, after the first convolution.
    """
    module, base, own = tiny()
    flop = train_step(BASE, module, own, base, *inputs())
    assert 0.9 <= flop["step"] / unavoidable(flop) <= 1.05
    assert flop["both"] >= flop["step"] + 0.6 * flop["base"]


@pytest.mark.parametrize("steps", [1, 5])
def test_the_sampling_loop_is_the_evaluations_and_one_preparation(steps):
    """Hint and text are embedded before the loop, whatever its length, and in no step."""
    module, base, own = tiny()
    params = {"base": base, "control": own}
    x, t, cond = inputs()
    once, step = preparation(module, params, cond), evaluation(module, params, x, t, cond)
    embedder = BATCH * 2 * 9 * (6 * 10 * (3 * 4 + 4 * 4) + 3 * 5 * (4 * 6 + 6 * 4))
    assert once > embedder
    assert sampling_loop(module, params, x, cond, steps) == once + steps * step


def sdxl(hint=True):
    """SDXL at 1024 px: (module, shapes of parameters, x, t, cond), one picture."""
    base, shape = UNet(**unet.PUBLISHED["sdxl"]), jax.ShapeDtypeStruct
    x, t = shape((1, 128, 128, 4), jnp.float32), shape((1,), jnp.int32)
    cond = {
        "text": shape((1, 77, 2048), jnp.float32),
        "pooled": shape((1, 1280), jnp.float32),
        "time_ids": shape((1, 6), jnp.float32),
    }
    cond |= {"hint": shape((1, 1024, 1024, 3), jnp.float32)} if hint else {}
    return base, shapes_of(base), x, t, cond


@pytest.mark.slow
def test_cost_beside_sdxl_at_1024():
    """One evaluation, 128x128 latents: ControlNet-XS at most 3 % above the base; ControlNet 45."""
    base, params, x, t, cond = sdxl()
    adapters = {
        "ControlNet-XS 48M": ControlNetXS(**layouts.PUBLISHED["sdxl_48m"]),
        "ControlNet-XS 20M": ControlNetXS(**layouts.PUBLISHED["sdxl_20m"]),
        "ControlNet": controlnet.from_unet(base),
    }
    alone = evaluation(base, params, x, t, sdxl(hint=False)[-1])
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl_48m", "sdxl_20m"])
def test_loop_and_train_step_at_1024(name):
    """The loop embeds the hint zero times; a step costs the unavoidable within 5 %."""
    base, params, x, t, cond = sdxl()
    adapter = ControlNetXS(**layouts.PUBLISHED[name])
    own = shapes_of(adapter)
    module, both = control.attach(base, params, adapter, own)
    once, step = preparation(module, both, cond), evaluation(module, both, x, t, cond)
    loop = sampling_loop(module, both, x, cond, 50)

    def embed(own, hint):
        return adapter.apply(
            {"params": own}, hint, method=lambda m, h: m.controlnet_cond_embedding(h)
        )

    embedder = counted(embed, own, cond["hint"])
    shared = preparation(base, params, cond)
    flop = train_step(base, module, own, params, x, t, cond)
    checks.record(
        f"sampling loop and train step of {name} at 1024 px",
        hint_embedder_gflop=round(embedder / 1e9, 1),
        evaluation_gflop=round(step / 1e9),
        loop_of_50_less_preparation_and_50_evaluations=loop - once - 50 * step,
        **{f"{key}_gflop": round(value / 1e9) for key, value in flop.items()},
        step_over_unavoidable=round(flop["step"] / unavoidable(flop), 4),
    )
    assert loop == once + 50 * step
    assert once >= embedder + shared
    assert 0.95 <= flop["step"] / unavoidable(flop) <= 1.05
    assert flop["both"] >= flop["step"] + 0.6 * flop["base"]

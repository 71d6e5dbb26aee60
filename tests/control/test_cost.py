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
from eval import closed_forms, flops
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


def train_step(base, module, own, frozen, batch):
    """FLOPs {forward, base, step}: of the loss, of the base's alone, of the adapter's gradient."""

    def plain(frozen, batch):
        return jnp.square(base.apply({"params": frozen}, *batch)).mean()

    return {
        "forward": counted(loss_of(module), own, frozen, batch),
        "base": counted(plain, frozen, batch),
        "step": counted(jax.grad(loss_of(module)), own, frozen, batch),
    }


def loss_of(module):
    """A loss of the adapter's parameters, the base's, and a batch (x, t, cond)."""

    def loss(own, frozen, batch):
        out = module.apply({"params": {"base": frozen, "control": own}}, *batch)
        return jnp.square(out).mean()

    return loss


def unavoidable(flop, base, x):
    """FLOPs of a train step with a frozen base.

    Adapter: forward and twice back. Base: forward, and once back through its activations, where a
    product with weights has one gradient instead of two; the two products of self-attention, whose
    factors all depend on the control, have two.
    """
    adapter = flop["forward"] - flop["base"]
    return 2 * flop["base"] + self_attention(base, x.shape) + 3 * adapter


def self_attention(base, shape):
    """FLOPs of the products among the picture's own tokens, in all transformers of a UNet."""
    batch, height, width, _ = shape
    layers, depth = map(base.per_level, (base.layers_per_block, base.transformer_layers_per_block))
    total, last = 0, len(layers) - 1
    for i, features in enumerate(base.block_out_channels):
        tokens = -(-height // 2**i) * -(-width // 2**i)
        attended = base.down_block_types[i].startswith("CrossAttn")
        transformers = attended * (2 * layers[i] + 1) + (i == last)
        total += transformers * depth[i] * closed_forms.attend(tokens, tokens, features)
    return batch * total


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
    flop = train_step(BASE, module, own, base, inputs())
    ratio = flop["step"] / unavoidable(flop, BASE, inputs()[0])
    both = counted(jax.grad(loss_of(module), argnums=(0, 1)), own, base, inputs())
    assert 0.9 <= ratio <= 1.05
    assert both >= flop["step"] + 0.6 * flop["base"]


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


def published(name):
    """(SDXL, the adapter, module with both, their shapes) of a published adapter."""
    base, params, *_ = sdxl()
    adapter = ControlNetXS(**layouts.PUBLISHED[name])
    module, both = control.attach(base, params, adapter, shapes_of(adapter))
    return base, adapter, module, both


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl_48m", "sdxl_20m"])
def test_the_sampling_loop_at_1024(name):
    """50 steps cost 50 evaluations, which have no hint embedder, and one preparation."""
    _, adapter, module, both = published(name)
    _, _, x, t, cond = sdxl()
    once, step = preparation(module, both, cond), evaluation(module, both, x, t, cond)
    loop = sampling_loop(module, both, x, cond, 50)

    def embed(own, hint):
        return adapter.apply(
            {"params": own}, hint, method=lambda m, hint: m.controlnet_cond_embedding(hint)
        )

    embedder = counted(embed, both["control"], cond["hint"])
    checks.record(
        f"sampling loop of {name} on SDXL at 1024 px",
        hint_embedder_gflop=round(embedder / 1e9, 1),
        preparation_gflop=round(once / 1e9, 1),
        evaluation_gflop=round(step / 1e9),
        loop_of_50_without_them_gflop=(loop - once - 50 * step) / 1e9,
    )
    assert once > embedder > 0.0
    assert loop == once + 50 * step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl_48m", "sdxl_20m"])
def test_a_train_step_at_1024(name):
    """Within 5 % of the unavoidable."""
    base, _, module, both = published(name)
    batch = sdxl()[2:]
    flop = train_step(base, module, both["control"], both["base"], batch)
    ratio = flop["step"] / unavoidable(flop, base, batch[0])
    checks.record(
        f"train step of {name} on SDXL at 1024 px",
        **{f"{key}_gflop": round(value / 1e9) for key, value in flop.items()},
        self_attention_gflop=round(self_attention(base, batch[0].shape) / 1e9),
        step_over_unavoidable=round(ratio, 4),
    )
    assert 0.95 <= ratio <= 1.05

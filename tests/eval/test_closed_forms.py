"""Full-size programs: what the walker counts in them, without weights, against the closed form.

The counts in TFLOP are those of PyTorch's FlopCounterMode on diffusers' and transformers' modules
(PixArt and SD: on the official ones), so the closed forms are not checked by themselves alone.
"""

import jax
import jax.numpy as jnp
import pytest

from cnxs_jax import control
from cnxs_jax.control import controlnet, controlnet_xs
from cnxs_jax.control.controlnet_xs import ControlNetXS
from cnxs_jax.convert import controlnet_xs as layouts
from cnxs_jax.convert import families
from cnxs_jax.convert import unet as unets
from cnxs_jax.errors import ConfigError
from cnxs_jax.models import clip, conv
from cnxs_jax.models.dit import PixArt
from cnxs_jax.models.t5 import T5Encoder
from cnxs_jax.models.unet import UNet
from cnxs_jax.models.vae import AutoencoderKL
from eval import closed_forms, closed_forms_control, flops
from eval.benchmark_cases import CASES
from eval.benchmark_networks import up_taps

WITHIN = 0.05


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def counted(module, *args, method=None):
    """FLOPs of the lowered program on abstract values: nothing is compiled or allocated."""
    init = lambda *a: module.init(jax.random.key(0), *a, method=method)["params"]  # noqa: E731
    params = jax.eval_shape(init, *args)
    program = jax.jit(lambda p, *a: module.apply({"params": p}, *a, method=method))
    return flops.count(program.lower(params, *args))


@pytest.mark.parametrize(("side", "tera"), [(32, 0.298), (64, 1.236), (128, 6.510)])
def test_pixart_xl_2(side, tera):
    module = PixArt(sample_size=side, use_additional_conditions=False)
    closed = closed_forms.pixart(module, 120)
    assert closed / 1e12 == pytest.approx(tera, rel=3e-3)
    cond = {"text": shape(1, 120, 4096), "text_mask": shape(1, 120)}
    assert counted(module, shape(1, side, side, 4), shape(1), cond) == pytest.approx(
        closed, rel=WITHIN
    )


def test_the_side_of_a_unet_that_names_two():
    adapter = ControlNetXS(**layouts.PUBLISHED["sd15_53m"])
    square, wide, none = (
        UNet(cross_attention_dim=768, sample_size=s) for s in ((64, 64), (48, 64), None)
    )
    assert closed_forms.unet(square) == closed_forms.unet(wide, side=64)
    given = closed_forms_control.added(wide, adapter, side=64)
    assert closed_forms_control.added(square, adapter) == given
    for module in (wide, none):
        with pytest.raises(ConfigError, match="for square latents"):
            closed_forms.unet(module)
        with pytest.raises(ConfigError, match="for square latents"):
            closed_forms_control.added(module, adapter)


@pytest.mark.parametrize(
    ("name", "side", "tera"),
    [("sd15", 64, 0.803), pytest.param("sdxl", 128, 6.761, marks=pytest.mark.slow)],
)
def test_unet(name, side, tera):
    module = UNet(**unets.PUBLISHED[name])
    assert closed_forms.unet(module, 77, side) / 1e12 == pytest.approx(tera, rel=5e-3)
    cond = {"text": shape(1, 77, module.cross_attention_dim)}
    if module.addition_embed_type:
        cond |= {"pooled": shape(1, 1280), "time_ids": shape(1, 6)}
    found = counted(module, shape(1, side, side, 4), shape(1), cond)
    assert found == pytest.approx(closed_forms.unet(module, 77, side, up_taps()), rel=WITHIN)


@pytest.mark.parametrize(("side", "tera"), [(64, 2.515), (128, 10.470)])
def test_vae_decoder(side, tera):
    module = AutoencoderKL()
    assert closed_forms.vae_decoder(module, side) / 1e12 == pytest.approx(tera, rel=5e-3)
    images = shape(1, 8 * side, 8 * side, 3)
    params = jax.eval_shape(lambda x: module.init(jax.random.key(0), x)["params"], images)
    program = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))
    found = flops.count(program.lower(params, shape(1, side, side, 4)))
    closed = closed_forms.vae_decoder(module, side, up_taps())
    assert found == pytest.approx(closed, rel=WITHIN)


def test_t5_xxl():
    module, ids = T5Encoder(), shape(1, 120, dtype=jnp.int32)
    closed = closed_forms.t5(module, 120)
    assert closed / 1e12 == pytest.approx(1.117, rel=1e-3)
    assert counted(module, ids, ids) == pytest.approx(closed, rel=WITHIN)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl 1", "sdxl 2"])
def test_clip_text(name):
    wide = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
    sd21 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
            "num_attention_heads": 16, "hidden_act": "gelu"}  # fmt: skip
    fields = {"sdxl 2": wide, "sd21": sd21}.get(name, {})
    projected = name == "sdxl 2"
    cls = clip.CLIPTextModelWithProjection if projected else clip.CLIPTextModel
    module = cls(**fields)
    closed = closed_forms.clip_text(module, 77, projected)
    found = counted(module, shape(1, 77, dtype=jnp.int32))
    assert found == pytest.approx(closed, rel=WITHIN)


def test_clip_image():
    module = clip.CLIPVisionModelWithProjection()  # ViT-L/14
    closed = closed_forms.clip_image(module)
    assert closed / 1e12 == pytest.approx(0.1621, rel=5e-3)
    assert counted(module, shape(1, 224, 224, 3)) == pytest.approx(closed, rel=WITHIN)


SD15 = UNet(**unets.PUBLISHED["sd15"])
ADAPTERS = {
    "ControlNet": controlnet.from_unet(SD15),
    "ControlNet-XS": ControlNetXS(**layouts.PUBLISHED["sd15_53m"]),
}


@pytest.mark.parametrize(
    ("name", "giga", "step"),
    [
        ("ControlNet", 1086.565416960, 2265.166577664),
        ("ControlNet-XS", 853.018804224, 1874.652692480),
    ],
)
def test_control_on_stable_diffusion(name, giga, step):
    """One evaluation and one gradient of the adapter, 512 px, against diffusers' modules."""
    closed = closed_forms_control.controlled(SD15, ADAPTERS[name], 77, 64)
    assert closed / 1e9 == pytest.approx(giga, rel=1e-9)
    found = closed_forms_control.train_step(SD15, ADAPTERS[name], 77, 64)
    assert found / 1e9 == pytest.approx(step, rel=5e-3)


SMALL = UNet(
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=2,
    cross_attention_dim=24,
    norm_num_groups=4,
)


@pytest.mark.parametrize(
    "kind", [pytest.param("ControlNet", marks=pytest.mark.slow), "ControlNet-XS"]
)
def test_controlled_programs_at_small_widths(kind):
    """What is counted in ours: an evaluation, what the steps share, the gradient of the adapter."""
    adapter = controlnet.from_unet(SMALL)
    if kind == "ControlNet-XS":
        adapter = controlnet_xs.from_unet(SMALL, block_out_channels=(8, 16), num_attention_heads=2)
    base, own = (families.shapes(m) for m in (SMALL, adapter))
    module, params = control.attach(SMALL, base, adapter, own)
    cond = {"text": shape(1, 9, 24), "hint": shape(1, 128, 128, 3)}
    args = shape(1, 16, 16, 4), shape(1), cond
    sizes = SMALL, adapter, 9, 16

    def run(own, base, *args):
        return module.apply({"params": {"base": base, "control": own}}, *args)

    def prepare(own, base, cond):
        both = {"params": {"base": base, "control": own}}
        return module.apply(both, cond, method="prepare")

    once = flops.count(jax.jit(run).lower(own, base, *args))
    assert once == pytest.approx(closed_forms_control.controlled(*sizes, up_taps()), rel=1e-9)
    shared = flops.count(jax.jit(prepare).lower(own, base, cond))
    assert shared == pytest.approx(closed_forms_control.prepared(*sizes), rel=1e-9)
    step = jax.grad(lambda *args: jnp.square(run(*args)).mean())
    closed = closed_forms_control.train_step(*sizes, up_taps())
    assert flops.count(jax.jit(step).lower(own, base, *args)) == pytest.approx(closed, rel=WITHIN)


SLOW = (
    "controlnet_sd15_512",
    "controlnet_xs_sd15_512",
    "controlnet_step_sd15_512",
    "controlnet_xs_step_sd15_512",
    "clip_text_bigg",
    "pixart_xl_1024_text",
)
OTHERS = [
    "t5_xxl", "denoise_step_xl_512", "lcd_step_xl_512", "operations_sd15_512", "operations_xl_512",
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_full_size_benchmark_builds(name):
    """Depth-reduced programs; those of the networks above are built there."""
    case = CASES[name]("full")
    for program, lowered in case.lower().items():
        closed = case.functions()[program][1]
        assert flops.count(lowered) == pytest.approx(closed, rel=WITHIN)


@pytest.mark.slow
def test_lowered_and_compiled_programs_count_alike():
    """A tiny UNet with its gradient: loops, strided and doubled convolutions, attention."""
    module = UNet(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    cond = {"text": shape(1, 7, 16)}
    args = (shape(1, 32, 32, 4), shape(1), cond)
    params = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    loss = lambda p, *a: module.apply({"params": p}, *a).sum()  # noqa: E731
    for f in (loss, jax.grad(loss)):
        lowered = jax.jit(f).lower(params, *args)
        assert flops.count(lowered) == pytest.approx(flops.count(lowered.compile()), rel=0.03)
    assert conv.MIN_PIXELS <= 32 * 32  # the gradient above goes through the scanned form

"""The UNet on its own: stages, prepared text, conditions, precision, bad configs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import tree
from cnxs_jax.convert import families, unet
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.unet import UNet

TINY = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=12,
    attention_head_dim=2,
    transformer_layers_per_block=(1, 2),
    addition_embed_type="text_time",
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=10 + 6 * 6,
    time_cond_proj_dim=8,
)
COUNTS = {
    "sd15": 859_520_964,
    "sd21": 865_910_724,
    "sdxl": 2_567_463_684,
    "sdxl_refiner": 2_259_526_660,
}


def inputs(size=(8, 12), seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    cond = {
        "text": normal(2, 5, 12),
        "text_mask": np.array([[1, 1, 0, 0, 0], [1] * 5]),
        "pooled": normal(2, 10),
        "time_ids": np.full((2, 6), 64.0, np.float32),
        "guidance": np.array([3.0, 7.5], np.float32),
    }
    return normal(2, *size, 4), np.array([3, 907]), cond


@pytest.fixture(scope="module")
def params():
    """Random numbers everywhere, of a size that keeps the activations near 1."""
    shapes = jax.eval_shape(UNet(**TINY).init, jax.random.key(0), *inputs())["params"]
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path.endswith("kernel"):
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32(path.endswith("scale")) + np.float32(0.1) * noise

    return tree.map_with_path(draw, shapes)


apply = jax.jit(
    lambda module, params, *args: module.apply({"params": params}, *args), static_argnums=0
)


def run(params, *args, **changes):
    return np.asarray(apply(UNet(**{**TINY, **changes}), params, *args))


def prepare(params, cond):
    return jax.jit(lambda p, c: UNet(**TINY).apply({"params": p}, c, method="prepare"))(
        params, cond
    )


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name):
    family = families.family_of({"_class_name": "UNet2DConditionModel"}, "config")
    module, target = families.build(family, unet.PUBLISHED[name], "config")
    assert tree.size(target) == COUNTS[name]
    assert module.num_stages == len(module.down_widths) == len(module.up_widths)


def test_stages_of_sd_and_sdxl():
    sd, sdxl = UNet(**unet.PUBLISHED["sd15"]), UNet(**unet.PUBLISHED["sdxl"])
    assert (sd.num_stages, sdxl.num_stages) == (12, 9)
    assert sd.down_widths == (320,) * 4 + (640,) * 3 + (1280,) * 5
    assert sd.up_widths == (1280,) * 6 + (640,) * 3 + (320,) * 3
    assert sdxl.down_widths == (320,) * 4 + (640,) * 3 + (1280,) * 2
    assert sdxl.up_widths == (1280,) * 3 + (640,) * 3 + (320,) * 3


def test_prepared_conditions_give_the_same_and_are_used(params):
    x, t, cond = inputs()
    ready = prepare(params, cond)
    out = run(params, x, t, cond)
    np.testing.assert_allclose(out, run(params, x, t, ready), atol=1e-5)
    # Read no more once they are prepared:
    stale = {k: np.zeros_like(cond[k]) for k in ("text", "pooled", "time_ids")}
    np.testing.assert_array_equal(run(params, x, t, ready), run(params, x, t, {**ready, **stale}))


class Interleaved(nn.Module):
    """The shape of a controller: the base's stages with additions in between."""

    base: UNet

    def __call__(self, x, t, cond, push):
        base, h, skips = self.base, x, []
        cond = base.prepare(cond)
        temb = base.embed(t, cond)
        for i in range(base.num_stages):
            h = base.down(i, h, temb, cond)
            assert h.shape[-1] == base.down_widths[i]
            h = h + push[i]
            skips.append(h)
        h = base.mid(h, temb, cond)
        for k in range(base.num_stages):
            h = base.up(k, h, skips, temb, cond)
            assert h.shape[-1] == base.up_widths[k]
        return base.head(h)


def test_a_module_around_the_stages_is_the_base_until_it_adds_something(params):
    x, t, cond = inputs(size=(7, 10))
    wrapper = Interleaved(UNet(**TINY))
    steer = jax.jit(lambda push: wrapper.apply({"params": {"base": params}}, x, t, cond, push))
    push = np.zeros(wrapper.base.num_stages, np.float32)
    base = run(params, x, t, cond)
    np.testing.assert_allclose(steer(push), base, atol=1e-5)
    for i in range(len(push)):
        changed = push.copy()
        changed[i] = 0.1
        assert np.abs(steer(changed) - base).max() > 1e-4


def test_every_condition_counts_and_examples_do_not_mix(params):
    x, t, cond = inputs()
    out = run(params, x, t, cond)
    for key in ("text", "pooled", "time_ids", "guidance"):
        changed = {**cond, key: cond[key].copy()}
        changed[key][1] = changed[key][1] * 0.5 + 0.25
        other = run(params, x, t, changed)
        np.testing.assert_allclose(other[0], out[0], atol=1e-5)
        assert np.abs(other[1] - out[1]).max() > 1e-4, key
    later = run(params, x, np.array([3, 908]), cond)
    np.testing.assert_allclose(later[0], out[0], atol=1e-5)
    assert np.abs(later[1] - out[1]).max() > 1e-6


def test_masked_text_does_not_count(params):
    x, t, cond = inputs()
    noise = np.where(cond["text_mask"][..., None] > 0, 0.0, 9.0).astype(np.float32)
    changed = {**cond, "text": cond["text"] + noise}
    np.testing.assert_allclose(run(params, x, t, cond), run(params, x, t, changed), atol=1e-5)
    bare = {k: v for k, v in changed.items() if k != "text_mask"}
    assert np.abs(run(params, x, t, bare)[0] - run(params, x, t, cond)[0]).max() > 1e-3


@pytest.mark.slow
def test_remat_gives_the_same_gradients(params):
    x, t, cond = inputs(size=(4, 4))

    def gradients(**changes):
        module = UNet(**{**TINY, **changes})

        def loss(p):
            return jnp.square(module.apply({"params": p}, x, t, cond)).mean()

        return jax.jit(jax.grad(loss))(params)

    plain, again = gradients(), gradients(remat="full")
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), plain, again)


def test_bfloat16_is_close_and_returns_float32(params):
    args = inputs()
    exact, rough = run(params, *args), run(params, *args, dtype=jnp.bfloat16)
    assert rough.dtype == np.float32
    assert 1e-4 < np.abs(rough - exact).max() / np.abs(exact).max() < 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(down_block_types=("DownBlock2D",)), "down_block_types"),
        (dict(up_block_types=("UpBlock2D", "AttnUpBlock2D")), "AttnUpBlock2D"),
        (dict(mid_block_type="UNetMidBlock2D"), "mid_block_type"),
        (dict(sample_size=(8,)), r"sample_size = \(8,\), expected a number of latents or"),
        (dict(sample_size=(8, 0)), r"sample_size = \(8, 0\)"),
        (dict(norm_num_groups=3), "not divisible by 3 groups"),
        (dict(attention_head_dim=(2, 3)), "3 heads"),
        (dict(transformer_layers_per_block=(1, 2, 3)), "transformer_layers_per_block"),
        (dict(addition_embed_type="text"), 'only "text_time"'),
        (dict(addition_time_embed_dim=None), "needs addition_time_embed_dim"),
    ],
)
def test_bad_configs_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        jax.eval_shape(UNet(**TINY | changes).init, jax.random.key(0), *inputs())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("text", None, "reads `text`"),
        ("text", np.zeros((2, 5, 13)), r"expected \[B,L,12\], got \[2, 5, 13\]"),
        ("pooled", None, "reads `pooled`"),
        ("pooled", np.zeros((2, 9)), "make 45 numbers, the model takes 46"),
        ("guidance", None, "reads `guidance`"),
    ],
)
def test_bad_conditions_are_refused(key, value, words):
    x, t, cond = inputs()
    cond = {k: v for k, v in {**cond, key: value}.items() if v is not None}
    with pytest.raises(ConfigError, match=words):
        jax.eval_shape(UNet(**TINY).init, jax.random.key(0), x, t, cond)

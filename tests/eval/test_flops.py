"""The FLOP walker against programs whose products can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cnxs_jax.errors import DataError
from cnxs_jax.models.dit import PixArt
from eval import closed_forms, flops

X, W = jnp.ones((32, 16)), jnp.ones((5, 16, 16))
ONE = 2 * 32 * 16 * 16


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def scanned(x, w):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def unrolled(x, w):
    for layer in w:
        x = jnp.tanh(x @ layer)
    return x


@pytest.mark.parametrize("f", [scanned, unrolled])
def test_a_loop_counts_as_often_as_it_runs(f):
    assert flops.count(compiled(f, X, W)) == 5 * ONE


def test_the_backward_pass_of_a_scan_is_twice_its_forward_pass():
    backward = compiled(jax.grad(lambda x, w: scanned(x, w).sum(), argnums=(0, 1)), X, W)
    assert flops.count(backward) == 3 * 5 * ONE


def test_nested_loops_multiply():
    def steps(x, w):
        return lax.fori_loop(0, 7, lambda _, x: scanned(x, w), x)

    assert flops.count(compiled(steps, X, W)) == 7 * 5 * ONE


def test_convolution_by_hand():
    x, kernel = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 16, 4))

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert flops.count(compiled(convolve, x, kernel)) == 2 * (2 * 8 * 8 * 4) * 9 * 16


def test_the_dearest_branch_counts():
    def f(x, w, flag):
        return lax.cond(flag, lambda x: x @ w[0] @ w[1], lambda x: x @ w[0], x)

    assert flops.count(compiled(f, X, W, jnp.array(True))) == 2 * ONE


def test_a_loop_of_unknown_length_is_refused():
    def f(x, w, n):
        return lax.fori_loop(0, n, lambda _, x: x @ w[0], x)

    with pytest.raises(DataError, match="unknown length"):
        flops.count(compiled(f, X, W, jnp.array(3)))


def test_a_product_inside_a_library_is_refused():
    hlo = """HloModule m

ENTRY %main (a: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8]{{1,0}} parameter(0)
  ROOT %c = f32[8,8]{{1,0}} custom-call(%a, %a), custom_call_target="{}"
}}
"""
    assert flops.count_text(hlo.format("TopK")) == 0
    for target in ("__cublas$gemm", "__cudnn$convForward", "__onednn$matmul"):
        with pytest.raises(DataError, match="products inside"):
            flops.count_text(hlo.format(target))


def test_a_scanned_dit_against_its_closed_form():
    """Two blocks as wide as PixArt-XL/2's; narrower ones are unrolled on a CPU."""
    config = {"num_layers": 2, "num_attention_heads": 16, "attention_head_dim": 72,
              "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 32}  # fmt: skip
    model, tokens = PixArt(**config), 120
    x, t = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jnp.ones((1,))
    cond = {
        "text": jax.ShapeDtypeStruct((1, tokens, 4096), jnp.float32),
        "text_mask": jnp.ones((1, tokens)),
    }
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, cond)["params"]
    program = jax.jit(lambda p, x, cond: model.apply({"params": p}, x, t, cond))
    counted = flops.count(program.lower(params, x, cond).compile())
    assert counted == pytest.approx(closed_forms.pixart(model, tokens), rel=0.01)

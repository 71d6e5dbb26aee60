"""Claims and roofline: figures by hand of small programs, and both commands at their tiny size."""

import jax
import jax.numpy as jnp
import pytest

from eval import claims, roofline

CARD = roofline.Card("a card", 1e12, 1e9)


def lowered(f, *shapes, dtype=jnp.bfloat16):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes))


def test_bytes_are_those_of_operands_and_result():
    found = roofline.work(lowered(lambda a, b: a @ b, (8, 16), (16, 32)), CARD)
    assert found.flops == 2 * 8 * 16 * 32
    assert found.bytes == 2 * (8 * 16 + 16 * 32 + 8 * 32)
    assert found.seconds == pytest.approx(found.bytes / CARD.bytes)  # bound by memory
    slow = CARD._replace(flops=1e3)
    program = lowered(lambda a, b: a @ b, (8, 16), (16, 32))
    assert roofline.work(program, slow).seconds == pytest.approx(found.flops / 1e3)


def test_loops_count_as_often_as_they_run_and_each_product_by_its_own_bound():
    def f(a, b):
        return jax.lax.fori_loop(0, 5, lambda _, x: x @ b, a)

    once = roofline.work(lowered(lambda a, b: a @ b, (8, 16), (16, 16)), CARD)
    five = roofline.work(lowered(f, (8, 16), (16, 16)), CARD)
    assert five == pytest.approx([5 * v for v in once])


def test_logits_stay_on_the_chip():
    def attend(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("blhd,bshd->bhls", q, k), -1)
        return jnp.einsum("bhls,bshd->blhd", weights, v)

    found = roofline.work(lowered(attend, *[(1, 64, 2, 4)] * 3), CARD)
    assert found.bytes == 2 * 4 * (64 * 2 * 4)  # q, k, v and the result
    assert found.flops == 2 * 2 * 2 * 64 * 64 * 4


def test_the_roofline_of_the_tiny_pipeline():
    found = {k: roofline.work(p, CARD) for k, p in roofline.programs("tiny").items()}
    text, both, _ = found.values()
    assert both.flops > text.flops > 0
    assert all(w.seconds >= w.flops / CARD.flops for w in found.values())
    assert "text encoding and 4-step sampling" in roofline.table(found, CARD)


def ratios(rows):
    assert all(r["GFLOP"] == pytest.approx(r["GFLOP closed form"], rel=0.05) for r in rows)
    return [r["to the first"] for r in rows]


def test_experts_cost_their_own_text_and_nothing_else():
    rows = claims.experts("tiny")
    assert ratios(rows)[0] == 1
    text = claims.closed_forms.pixart_text(claims.PixArt("tiny").module, 20) / 1e9
    assert rows[1]["GFLOP"] - rows[0]["GFLOP"] == pytest.approx(2 * text, rel=1e-6)


def test_few_steps_without_guidance_against_guided_ones():
    student, fourteen, twentyfive = ratios(claims.few_steps("tiny"))
    assert 6.5 < fourteen < 7.0  # 28 evaluations for 4; the text is read once by each
    assert 11.5 < twentyfive < 12.5


@pytest.mark.slow
def test_control_at_tiny_size():
    alone, xs, copy, *_ = ratios(claims.control("tiny"))
    assert alone < xs
    assert alone < copy

"""The train steps of the DiT lower for a TPU on any machine, splash attention included."""

import jax
import jax.numpy as jnp
import pytest

from cnxs_jax.diffusion import sampling, schedule, solvers
from cnxs_jax.diffusion.guidance import cfg
from cnxs_jax.models.dit import PixArt
from train import objectives, optimizer
from train.step import init_state, make_step

SIDE = 64  # 1024 tokens: long enough for splash


def network(impl):
    return PixArt(
        num_layers=2, num_attention_heads=2, attention_head_dim=72, cross_attention_dim=144,
        in_channels=4, out_channels=8, sample_size=SIDE, caption_channels=16,
        dtype=jnp.bfloat16, remat="full", attention_impl=impl,
    )  # fmt: skip


def conditions(null):
    cond = {"text": jnp.zeros((2, 8, 16)), "text_mask": jnp.ones((2, 8), jnp.int32)}
    return cond | ({"null": {"text": jnp.ones((2, 8, 16))}} if null else {})


@pytest.mark.parametrize("impl", ["xla", "splash"])
@pytest.mark.parametrize("task", ["denoise", "consistency"])
def test_train_step(task, impl):
    run, noise = sampling.denoiser(network(impl)), schedule.linear()
    cond, x = conditions(task == "consistency"), jnp.zeros((2, SIDE, SIDE, 4))
    params = jax.eval_shape(run.module.init, jax.random.key(0), x, jnp.zeros(2), conditions(False))
    params = params["params"]
    if task == "denoise":
        objective, frozen = objectives.denoise(run, noise, learned_range=True), {}
    else:
        objective, frozen = objectives.consistency(run, run, noise), {"teacher": params}
    tx = optimizer.optax.adamw(1e-4)
    state = jax.eval_shape(lambda p: init_state(p, tx), params)
    step = jax.jit(make_step(objective, tx, 0.95), donate_argnums=0)
    traced = step.trace(state, frozen, {"x": x, "cond": cond}, jax.random.key(0))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == (impl == "splash")
    assert "jax.buffer_donor" in text or "tf.aliasing_output" in text


@pytest.mark.parametrize("impl", ["xla", "splash"])
def test_sampling_loop(impl):
    run = sampling.denoiser(network(impl))
    cond = conditions(True) | {"guidance_scale": jnp.full((2,), 4.5)}
    x = jnp.zeros((2, SIDE, SIDE, 4))
    params = jax.eval_shape(run.module.init, jax.random.key(0), x, jnp.zeros(2), conditions(False))
    table = solvers.dpmpp(schedule.linear(), 4)
    sample = jax.jit(lambda p, x, cond, table: sampling.sample(cfg(run), p, x, cond, table))
    traced = sample.trace(params["params"], x, cond, table)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == (impl == "splash")

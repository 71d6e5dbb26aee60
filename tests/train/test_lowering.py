"""The train steps and sampling loops of the DiT lower for TPUs on any machine, splash included.

On one device and on a mesh of eight; there splash must run on each device's own rows and heads,
or the kernel does not lower at all.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from cnxs_jax import sharding
from cnxs_jax.diffusion import sampling, schedule, solvers
from cnxs_jax.diffusion.guidance import cfg
from cnxs_jax.models.dit import PixArt
from train import objectives, optimizer
from train.step import init_state, make_step

SIDE = 64  # 1024 tokens: long enough for splash
BATCH, HEADS = 8, 4
ONE, EIGHT = {"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}
CASES = [("xla", ONE), ("splash", ONE), ("splash", EIGHT)]


def network(impl):
    return PixArt(
        num_layers=2, num_attention_heads=HEADS, attention_head_dim=72, cross_attention_dim=288,
        in_channels=4, out_channels=8, sample_size=SIDE, caption_channels=16,
        dtype=jnp.bfloat16, remat="full", attention_impl=impl,
    )  # fmt: skip


def conditions(null, batch=BATCH):
    cond = {"text": jnp.zeros((batch, 8, 16)), "text_mask": jnp.ones((batch, 8), jnp.int32)}
    return cond | ({"null": {"text": jnp.ones((batch, 8, 16))}} if null else {})


def parameters(module):
    x = jnp.zeros((1, SIDE, SIDE, 4))
    return jax.eval_shape(module.init, jax.random.key(0), x, jnp.zeros(1), conditions(False, 1))[
        "params"
    ]


def mesh_of(spec):
    return sharding.make_mesh(spec, jax.devices()[: math.prod(spec.values())])


def on(mesh, shapes):
    """Parameters, placed as the loop places them."""
    return sharding.abstract(shapes, sharding.shardings(shapes, mesh))


def batched(mesh, tree):
    shapes = jax.eval_shape(lambda: tree)
    where = sharding.batch_sharding(mesh)
    return sharding.abstract(shapes, jax.tree.map(lambda _: where, shapes))


def check_kernels(text, impl, mesh):
    """Splash is there if it was asked for, on a device's share: [rows, heads, tokens, 128]."""
    calls = re.findall(r"stablehlo.custom_call @tpu_custom_call.*", text)
    assert bool(calls) == (impl == "splash")
    rows = {BATCH // sharding.batch_parts(mesh), 2 * BATCH // sharding.batch_parts(mesh)}
    for call in calls:
        blocks = re.findall(r"tensor<(\d+)x(\d+)x1024x128x", call)
        assert blocks
        assert {int(b) for b, _ in blocks} <= rows
        assert {int(h) for _, h in blocks} == {HEADS // mesh.shape["tensor"]}


@pytest.mark.parametrize(("impl", "spec"), CASES, ids=str)
@pytest.mark.parametrize("task", ["denoise", "consistency"])
def test_train_step(task, impl, spec):
    run, noise, mesh = sampling.denoiser(network(impl)), schedule.linear(), mesh_of(spec)
    params, tx = parameters(run.module), optimizer.optax.adamw(1e-4)
    if task == "denoise":
        objective, frozen = objectives.denoise(run, noise, learned_range=True), {}
    else:
        objective, frozen = objectives.consistency(run, run, noise), {"teacher": params}
    batch = {"x": jnp.zeros((BATCH, SIDE, SIDE, 4)), "cond": conditions(task == "consistency")}
    state = on(mesh, jax.eval_shape(lambda p: init_state(p, tx), params))
    frozen = on(mesh, frozen)
    with jax.set_mesh(mesh):
        step = jax.jit(make_step(objective, tx, 0.95), donate_argnums=0)
        traced = step.trace(state, frozen, batched(mesh, batch), jax.random.key(0))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    check_kernels(text, impl, mesh)
    assert "jax.buffer_donor" in text or "tf.aliasing_output" in text


@pytest.mark.parametrize(("impl", "spec"), CASES, ids=str)
def test_sampling_loop(impl, spec):
    run, mesh = sampling.denoiser(network(impl)), mesh_of(spec)
    cond = conditions(True) | {"guidance_scale": jnp.full((BATCH,), 4.5)}
    table = solvers.dpmpp(schedule.linear(), 4)
    params = on(mesh, parameters(run.module))
    x = batched(mesh, jnp.zeros((BATCH, SIDE, SIDE, 4)))
    sample = jax.jit(lambda p, x, cond, table: sampling.sample(cfg(run), p, x, cond, table))
    with jax.set_mesh(mesh):
        traced = sample.trace(params, x, batched(mesh, cond), table)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    check_kernels(text, impl, mesh)

"""The recipes of the published sizes: their figures, and that each builds, on shapes alone."""

import jax
import numpy as np
import pytest

from cnxs_jax import tree as trees
from cnxs_jax.control.controlnet_transformer import ControlledPixArt
from cnxs_jax.models.dit import PixArt
from cnxs_jax.pipelines import load
from configs import pixart_control, pixart_lcm, pixart_lcm_lora
from train import abstract, optimizer, validate
from train.step import make_step

RECIPES = {"lcm": pixart_lcm, "lora": pixart_lcm_lora, "control": pixart_control}
SIZES = {"xl_256": 256, "xl_512": 512, "xl_1024": 1024}
WITH_SIZES, WITHOUT = 611_349_152, 610_856_096  # PixArt-XL/2 with and without micro-conditioning
CONTROL = 294_917_760  # 13 copied blocks and their linears

# What the papers and their scripts say (PixArt-delta sections 3 and 4; train_pixart_lcm.py,
# train_pixart_lcm_lora.py, the ControlNet configs).
SHARED = {
    "optimizer.name": "adamw", "optimizer.learning_rate": 2e-5, "optimizer.schedule": "constant",
    "schedule.name": "linear", "schedule.beta_start": 1e-4, "schedule.beta_end": 0.02,
    "schedule.num_steps": 1000, "objective.prediction": "epsilon", "data.max_length": 120,
    "remat": "full", "dtype": "bfloat16", "grad_accum": 1,
}  # fmt: skip
DISTILL = {
    "objective.omega": 4.5, "objective.num_ddim_steps": 50, "objective.loss": "pseudo_huber",
    "objective.huber_c": 1e-3, "ema_decay": 0.95, "steps": 5000, "optimizer.warmup_steps": 100,
    "optimizer.weight_decay": 0.0,
}  # fmt: skip
FIGURES = {
    "lcm": SHARED | DISTILL | {
        "batch_size": 24, "optimizer.eps": 1e-10, "optimizer.clip_norm": 0.01,
    },
    "lora": SHARED | DISTILL | {"batch_size": 32, "lora.rank": 32, "lora.alpha": 8.0},
    "control": SHARED | {
        "control.num_layers": 13, "control.order": "released", "optimizer.eps": 1e-10,
        "optimizer.clip_norm": 0.01, "optimizer.weight_decay": 0.03,
    },
}  # fmt: skip


def at(config, path):
    for key in path.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize("variant", SIZES)
@pytest.mark.parametrize("name", RECIPES)
def test_the_figures_are_the_published_ones(name, variant):
    config = RECIPES[name].get_config(variant)
    validate.check(config)
    assert config.data.size == SIZES[variant]
    found = {path: at(config, path) for path in FIGURES[name]}
    assert found == FIGURES[name]
    if name == "control":
        assert config.batch_size == (64 if variant == "xl_1024" else 192)


def trained(name, size):
    """Parameters that the recipe trains."""
    whole = WITH_SIZES if size == 1024 else WITHOUT
    return {"lcm": whole, "control": CONTROL}.get(name)


@pytest.mark.parametrize(
    "variant", ["xl_1024", *(pytest.param(v, marks=pytest.mark.slow) for v in ("xl_256", "xl_512"))]
)
@pytest.mark.parametrize("name", RECIPES)
def test_state_and_step_build_on_shapes(name, variant):
    """The whole step is traced at its published batch; nothing of it is allocated."""
    config = RECIPES[name].get_config(variant)
    size, batch = SIZES[variant], config.batch_size
    task, _, shapes = abstract.built(config)
    state, given = shapes["state"], shapes["batch"]
    expected = trained(name, size)
    if expected is None:
        rank = config.lora.rank
        found = trees.flatten(state.params)
        assert {v.shape[-1] for k, v in found.items() if k.endswith("lora_A")} == {rank}
        expected = sum(v.size for v in found.values())
        assert expected < 0.05 * WITHOUT
    assert trees.size(state.params) == expected
    assert trees.size(state.ema) == expected
    assert {str(v.dtype) for v in jax.tree.leaves(state.params)} == {"float32"}
    frozen = shapes["frozen"]["base" if name == "control" else "teacher"]
    assert trees.size(frozen) == (WITH_SIZES if size == 1024 else WITHOUT)
    assert given["x"].shape == (batch, size // 8, size // 8, 4)
    assert given["cond"]["text"].shape == (batch, 120, 4096)
    assert ("size" in given["cond"]) == (size == 1024)
    tx = optimizer.make_optimizer(config.optimizer, config.steps)
    step = make_step(task.objective, tx, config.ema_decay, config.grad_accum)
    new, metrics = jax.eval_shape(step, state, shapes["frozen"], given, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [(1024, 3_645_908_096), pytest.param(512, 3_629_780_096, marks=pytest.mark.slow)],
)
def test_a_controller_has_the_shapes_of_the_released_file(size, nbytes):
    """Base, control and position table, float32: the bytes of PixArt-XL-2-SIZE-ControlNet.pth."""
    config = pixart_control.get_config(f"xl_{size}")
    config.batch_size = 1
    _, module, shapes = abstract.built(config)
    assert isinstance(module, ControlledPixArt)
    assert isinstance(module.base, PixArt)
    params = {"base": shapes["frozen"]["base"], "control": shapes["state"].params}
    # Arrays of one repeated byte: the layout without the memory.
    flat = jax.tree.map(lambda s: np.broadcast_to(np.int8(0), s.shape), params)
    null = np.broadcast_to(np.int8(0), (120, 4096))
    tensors = load.official_tensors(module, flat, null)
    if size == 1024:
        assert len(tensors) == 668
    assert 4 * sum(value.size for value in tensors.values()) == nbytes

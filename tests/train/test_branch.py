"""Branches: what a child takes from its parent, and experts that train without talking."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax import sharding
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.models.conv import Conv
from tests.programs import exchanges
from tests.train import toy
from train import branch, log, loop, optimizer
from train.objectives_edm import edm_denoise
from train.step import init_state, make_step

E, B = 4, 4
X = jax.random.normal(jax.random.key(0), (E * B, 8, 8, 3))
KEY = jax.random.key(7)
EDGES = jnp.linspace(0.0, 1.0, E + 1)
FROZEN = {"interval": jnp.stack([EDGES[:-1], EDGES[1:]], axis=1)}


class Network(nn.Module):
    """Two convolutions that read the noise level."""

    @nn.compact
    def __call__(self, x, t, cond):
        h = nn.silu(Conv(8, name="first")(x) + t[:, None, None, None])
        return Conv(3, name="last")(h)


def network(params, x, t, cond):
    return Network().apply({"params": params}, x, t, cond)


TX = optimizer.make_optimizer({"learning_rate": 1e-2, "warmup_steps": 2}, 10)
STEP = make_step(edm_denoise(network, interval=None), TX, 0.9)


@pytest.fixture(scope="module")
def state():
    def init():
        return Network().init(jax.random.key(2), X[:1], jnp.zeros(1), {})["params"]

    return jax.jit(lambda: init_state(init(), TX))()


def side_by_side(state, spec):
    """`(compiled program, its arguments)` for four experts on eight devices."""
    mesh = sharding.make_mesh(spec)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: state)
        one = sharding.abstract(shapes, sharding.shardings(shapes, mesh))
        placed = jax.tree.map(lambda leaf: leaf.sharding, branch.stacked(one, E))
        states = jax.jit(branch.copies(lambda s: s, E), out_shardings=placed)(state)
        step = branch.side_by_side(STEP, E, mesh)
        run = jax.jit(step, out_shardings=(placed, branch.apart(mesh)))
        batch = jax.device_put({"x": X, "cond": {}}, sharding.batch_sharding(mesh))
        args = (states, jax.device_put(FROZEN, branch.apart(mesh)), batch, KEY)
        return run.lower(*args).compile(), args


@pytest.mark.parametrize("spec", [{"expert": 4, "data": 2}, {"expert": 2, "data": 4}])
def test_experts_side_by_side_are_experts_alone_and_never_talk(state, spec):
    compiled, args = side_by_side(state, spec)
    assert exchanges(compiled) == {"all-reduce"}
    hlo = compiled.as_text()
    groups = re.findall(r"feature_group_count=(\d+)", hlo)
    assert set(groups) <= {"1"}
    # What is summed over devices is summed within an expert's own group of them.
    sums = re.findall(r"all-reduce(?:-start)?\(.*", hlo)
    assert sums
    for line in sums:
        for group in replica_groups(line):
            assert len({device // (8 // spec["expert"]) for device in group}) == 1, line

    states, metrics = compiled(*args)
    alone = jax.jit(STEP)
    for e in range(E):
        batch = {"x": X[e::E], "cond": {}}
        interval = {"interval": FROZEN["interval"][e]}
        want, want_metrics = alone(state, interval, batch, jax.random.fold_in(KEY, e))
        got = jax.tree.map(lambda leaf, e=e: leaf[e], states)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert float(metrics["loss"][e]) == pytest.approx(float(want_metrics["loss"]), rel=1e-5)
    shown = {k: float(v) for k, v in branch.summary(metrics).items()}
    assert shown["loss"] == pytest.approx(np.mean([shown[f"loss_{e}"] for e in range(E)]))
    assert np.ptp(metrics["loss"]) > 1e-3


def replica_groups(line):
    """The groups of devices that an HLO line names, in any of its three notations."""
    listed = re.search(r"replica_groups=\{\{(.*?)\}\}", line)
    if listed:
        return [[int(d) for d in group.split(",")] for group in listed[1].split("},{")]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if tiled:
        groups, shape, order = (
            tuple(int(n) for n in part.split(",")) if part else None for part in tiled.groups()
        )
        return np.arange(8).reshape(shape).transpose(order).reshape(groups).tolist()
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    sizes = [int(n) for n in re.findall(r"=(\d+)", named[1])]
    axes = [int(n) for n in re.findall(r"axis_(\d+)", named[2])]
    devices = np.moveaxis(np.arange(8).reshape(sizes), axes, range(-len(axes), 0))
    return devices.reshape(-1, np.prod([sizes[a] for a in axes])).tolist()


def test_experts_that_the_axis_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match="3 experts on 4 groups"):
        branch.side_by_side(STEP, 3, sharding.make_mesh({"expert": 4, "data": 2}))


def test_a_child_starts_as_its_parent_with_a_new_clock(tmp_path):
    """Weights, EMA and both moments; the learning rate warms up again."""
    parent = toy.config(steps=5)
    loop.main(parent, tmp_path / "parent")
    child = toy.config(steps=5)
    child.toy.parent = str(tmp_path / "parent")
    fit = loop.Fit(child, loop.build_task(child), sharding.make_mesh(child.mesh), tmp_path)
    first = fit.fresh()
    stored = branch.parent_state(tmp_path / "parent", fit.one)
    assert (int(first.step), int(stored.step)) == (0, 5)
    for name in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(first, name), getattr(stored, name))
    adam, old = find(first.opt_state, "mu"), find(stored.opt_state, "mu")
    jax.tree.map(np.testing.assert_array_equal, adam, old)  # its count, too
    assert int(adam.count) == 5
    schedules = [s for s in jax.tree.leaves(first.opt_state, is_leaf=schedule) if schedule(s)]
    assert [int(s.count) for s in schedules] == [0]


def schedule(node):
    return type(node).__name__ == "ScaleByScheduleState"


def find(tree, field):
    nodes = jax.tree.leaves(tree, is_leaf=lambda n: hasattr(n, field))
    return next(n for n in nodes if hasattr(n, field))


def test_a_parent_that_is_not_there_is_named(tmp_path):
    config = toy.config()
    config.toy.parent = str(tmp_path / "nobody")
    with pytest.raises(CheckpointError, match="nobody"):
        loop.main(config, tmp_path / "child")


def test_the_loop_trains_experts_side_by_side_and_goes_on_with_them(tmp_path):
    config = toy.config(steps=2, mesh={"expert": 2, "data": 4}, save_every=2)
    config.toy.experts = 2
    loop.main(config, tmp_path)
    first = np.load(tmp_path / "export" / "params.npz")["gain"]
    assert first.shape == (2,)
    assert first[0] != first[1]  # each has seen its own pictures
    config.steps = 3
    loop.main(config, tmp_path, resume=True)
    lines = log.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["loss"] == pytest.approx((line["loss_0"] + line["loss_1"]) / 2, rel=1e-5)
        assert line["loss_0"] != line["loss_1"]
    after = np.load(tmp_path / "export" / "params.npz")["gain"]
    assert np.abs(after - first).max() < 0.1  # it went on and did not start again
    config.batch_size = 12
    with pytest.raises(ConfigError, match="batch_size 12"):
        loop.main(config, tmp_path / "other")

"""The recipes' own train steps on meshes of eight devices: as on one, sharded without being told.

The networks are a small PixArt DiT with its T5 (`tests.train.small`); no config names a rule.
"""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cnxs_jax import precision, sharding
from cnxs_jax import tree as trees
from cnxs_jax.models import dit
from tests import checks
from tests.pipelines import tiny
from tests.train import small
from train import loop, validate

pytestmark = pytest.mark.filterwarnings("ignore:caption has")

MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 2, "fsdp": 4},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
TASKS = ("denoise", "consistency")


@pytest.fixture(scope="module", autouse=True)
def programs():
    """The blocks are scanned as they are on a TPU; a CPU would write a small network out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dit, "unrolled", lambda *_: 1)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mesh")
    small.teacher(root)
    (root / "run").mkdir()  # the workdir, beside its teacher
    return root


def fit_on(task, root, spec):
    """The loop's own `Fit` of a recipe on a mesh of simulated devices."""
    config = small.get_config(task)
    config.mesh = spec
    validate.check(config)
    mesh = sharding.make_mesh(spec, jax.devices()[: math.prod(spec.values())])
    with jax.set_mesh(mesh):
        made = loop.build_task(loop.expand(config, root / "run"))
        if callable(made.params):  # random weights, without compiling the initialisers
            shapes = jax.eval_shape(made.params, jax.random.key(0))
            made = made._replace(params=tiny.filled(shapes))
        fit = loop.Fit(config, made, mesh, root)
        fit.restore(SimpleNamespace(restore=lambda *_: None))
    return fit


def losses_of(fit):
    losses = []
    with jax.set_mesh(fit.mesh), precision.matmul(fit.precision):
        for step in range(small.STEPS):
            batch = fit.batch(step)
            fit.state, metrics = fit.step(fit.state, fit.frozen, batch, fit.key_step)
            losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(
    scope="module", params=[pytest.param("denoise", marks=pytest.mark.slow), "consistency"]
)
def one(request, root):
    """(task, losses on one device)"""
    return request.param, losses_of(fit_on(request.param, root, {"data": 1}))


def split_of(tree):
    return {k: x.sharding.spec for k, x in trees.flatten(tree).items()
            if not x.sharding.is_fully_replicated}  # fmt: skip


# "tensor" has all three axes at once; the others apart take minutes
ALONE = [pytest.param(name, marks=pytest.mark.slow) for name in ("data", "fsdp")]


@pytest.mark.parametrize("name", ["tensor", *ALONE])
def test_eight_devices_equal_one(name, one, root):
    """20 steps: loss within 1e-5 relative, compiled once, the old state freed, split by rules."""
    task, reference = one
    fit = fit_on(task, root, MESHES[name])
    first = jax.tree.leaves(fit.state)
    before = split_of(fit.state)
    losses = losses_of(fit)
    worst = max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
    assert worst < 1e-5
    if name != "tensor":
        checks.record("eight devices equal one", recipe=task, mesh=name, steps=len(losses),
                      worst_relative_loss=worst)  # fmt: skip
    assert fit.step._cache_size() == fit.encode._cache_size() == 1
    assert all(x.is_deleted() for x in first)
    assert split_of(fit.state) == before
    query = next(k for k in trees.flatten(fit.state.ema) if k.endswith("attn1/to_q/kernel"))
    expected = {"data": None, "fsdp": P(None, "fsdp", None), "tensor": P(None, "fsdp", "tensor")}
    for part in ("params", "ema", "opt_state"):
        found = [v for k, v in before.items() if k.startswith(part) and k.endswith(query)]
        assert set(found) == ({expected[name]} - {None}), part
    frozen = {**split_of(fit.frozen), **split_of(fit.encoders)}
    assert bool(frozen) == (name != "data" and task == "consistency")


@pytest.mark.parametrize("task", TASKS)
def test_networks_stay_on_the_host_until_they_are_placed(task, root):
    made = loop.build_task(loop.expand(small.get_config(task), root / "run"))
    leaves = jax.tree.leaves((made.frozen, made.encoders))
    leaves += [] if callable(made.params) else jax.tree.leaves(made.params)
    assert len(leaves) > 20
    assert {type(x) for x in leaves} == {np.ndarray}


def test_every_family_has_rules_that_fit_it(tmp_path):
    """Each rule of a family's table names weights of it, and splits them over both axes."""
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    joint = jax.eval_shape(
        loop.build_task(loop.expand(small.get_config(), tmp_path)).params, jax.random.key(0)
    )
    clip = {"self_attn": {f"{n}_proj": dense(8, 8) for n in ("q", "k", "v", "out")}}
    clip["mlp"] = {"fc1": dense(8, 32), "fc2": dense(32, 8)}
    tables = {
        sharding.DIT_RULES: joint["transformer"],
        sharding.T5_RULES: joint["text_encoder"],
        sharding.CLIP_RULES: clip,
    }
    for rules, params in tables.items():
        sharding.shardings(params, mesh, rules)  # strict: a rule without a weight is an error
        placed = trees.flatten(sharding.shardings(params, mesh))
        for path, leaf in trees.flatten(params).items():
            if any(sharding._suffix_match(pattern, path) for pattern, _ in rules):
                parts = math.prod(leaf.shape) // math.prod(placed[path].shard_shape(leaf.shape))
                assert parts == (8 if path.endswith("kernel") else 2), path


def dense(inputs, outputs):
    shapes = {"kernel": (2, inputs, outputs), "bias": (2, outputs)}
    return {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}

"""Branches of a trained model: where they start, and how several train side by side.

eDiff-I (arXiv 2211.01324, section 4.1) trains one model on all noise levels, then copies it into
experts. Experts share nothing afterwards, so on the `expert` axis of the mesh nothing is exchanged:
`shard_map` gives each group of devices its own program. (`vmap` would turn convolutions into
grouped ones, and the partitioner would gather every expert's weights for them.)
"""

import pathlib

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cnxs_jax import checkpoint
from cnxs_jax.errors import CheckpointError, ConfigError
from cnxs_jax.sharding import BATCH


def parent_state(directory, abstract):
    """The newest good TrainState of the run in `directory`, as `abstract` places it.

    Raises:
        CheckpointError: no checkpoint there, or one of another model or optimizer.
    """
    place = pathlib.Path(directory) / "checkpoints"
    if not checkpoint.saved_steps(place):
        raise CheckpointError("the parent has no checkpoint", place, "train it before its branches")
    with checkpoint.Checkpoints(place, resume=True) as checkpoints:
        return checkpoints.restore(abstract)[0]


def restarted(state):
    """A parent's state as a child's first one: weights, EMA and moments stay.

    The step and the place in the learning-rate schedule go back to 0; Adam's own count stays, its
    moments are warm.
    """

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    def again(node):
        return node._replace(count=jnp.zeros_like(node.count)) if is_schedule(node) else node

    optimizer = jax.tree.map(again, state.opt_state, is_leaf=is_schedule)
    return state._replace(step=jnp.zeros_like(state.step), opt_state=optimizer)


def copies(make, experts):
    """`make` whose result has every leaf `experts` times, on a leading axis."""

    def stack(leaf):
        return jnp.broadcast_to(leaf[None], (experts, *leaf.shape))

    return lambda *args: jax.tree.map(stack, make(*args))


def stacked(abstract, experts):
    """`abstract` with a leading axis of `experts`, split over the mesh's `expert` axis."""

    def one(leaf):
        where = NamedSharding(leaf.sharding.mesh, P("expert", *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((experts, *leaf.shape), leaf.dtype, sharding=where)

    return jax.tree.map(one, abstract)


def apart(mesh):
    """The leading axis of every array split over the mesh's `expert` axis."""
    return NamedSharding(mesh, P("expert"))


def side_by_side(step, experts, mesh):
    """`step(states, frozen, batch, key) -> (states, metrics)` of stacked experts.

    Args:
        step: of one expert (`train.step.make_step`).
        experts: E, a multiple of the mesh's `expert` axis; each group of devices trains its share
            one after the other.
        mesh: its other axes split each expert's batch and parameters as usual.

    In the result, `states`, `frozen` and the metrics have the leading axis E and `batch` has E
    times an expert's examples: expert e takes the rows e, e + E, ... and draws from
    `fold_in(key, e)`.

    Raises:
        ConfigError: experts that the axis does not divide.
    """
    if experts % mesh.shape["expert"]:
        raise ConfigError(
            f"{experts} experts on {mesh.shape['expert']} groups of devices",
            "mesh.expert",
            "use a divisor of the number of experts",
        )

    def share(states, frozen, batch, keys):
        return jax.lax.map(lambda own: step(*own), (states, frozen, batch, keys))

    shares = jax.shard_map(
        share,
        mesh=mesh,
        in_specs=P("expert"),
        out_specs=P("expert"),
        axis_names={"expert"},
        check_vma=False,
    )

    def cut(leaf):
        rows = leaf.reshape(leaf.shape[0] // experts, experts, *leaf.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, P("expert", BATCH)))

    def run(states, frozen, batch, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(experts))
        return shares(states, frozen, jax.tree.map(cut, batch), keys)

    return run


def summary(metrics):
    """The metrics [E] of stacked experts as scalars: means, and each one's loss as `loss_0`, ...

    Not a part of the step: its program exchanges nothing between experts.
    """
    losses = {f"loss_{e}": loss for e, loss in enumerate(metrics["loss"])}
    means = {name: value.mean() for name, value in metrics.items() if name != "finite"}
    return {**means, **losses, "finite": metrics["finite"].all()}

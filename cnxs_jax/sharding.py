"""Device meshes and the placement of arrays on them.

One mesh `('expert', 'data', 'fsdp', 'tensor')`; parameters are placed by ordered
`(pattern, spec)` rules over their 'a/b/kernel' paths, batches over `('data', 'fsdp')`. XLA derives
every collective from these placements (`jax.jit` with `NamedSharding`).
"""

import logging
import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cnxs_jax import tree as trees
from cnxs_jax.errors import ConfigError, did_you_mean

AXES = ("expert", "data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
AUTO_FSDP_BYTES = 4 * 2**20  # arrays above this are split although no rule names them

# Megatron's layout: the first projection of a pair is split by columns, the second by rows, so
# that one all-reduce a pair is all the communication that `tensor` needs.
_COLUMNS, _ROWS, _BIAS = ("fsdp", "tensor"), ("tensor", "fsdp"), ("tensor",)
# diffusers' transformers: the DiT, the UNets' and their controllers'
DIT_RULES = (
    (r"attn[12]/to_[qkv]/kernel", _COLUMNS),
    (r"attn[12]/to_[qkv]/bias", _BIAS),
    (r"attn[12]/to_out_0/kernel", _ROWS),
    (r"ff/net_0/proj/kernel", _COLUMNS),
    (r"ff/net_0/proj/bias", _BIAS),
    (r"ff/net_2/kernel", _ROWS),
)
T5_RULES = (
    (r"SelfAttention/[qkv]/kernel", _COLUMNS),
    (r"SelfAttention/o/kernel", _ROWS),
    (r"DenseReluDense/wi(_[01])?/kernel", _COLUMNS),
    (r"DenseReluDense/wo/kernel", _ROWS),
)
CLIP_RULES = (
    (r"self_attn/[qkv]_proj/kernel", _COLUMNS),
    (r"self_attn/[qkv]_proj/bias", _BIAS),
    (r"self_attn/out_proj/kernel", _ROWS),
    (r"mlp/fc1/kernel", _COLUMNS),
    (r"mlp/fc1/bias", _BIAS),
    (r"mlp/fc2/kernel", _ROWS),
)
MODEL_RULES = (*DIT_RULES, *T5_RULES, *CLIP_RULES)  # of all families: their names are distinct

log = logging.getLogger(__name__)


def make_mesh(spec=None, devices=None):
    """A mesh with the axes `AXES`.

    Args:
        spec: {axis: size}; missing axes are 1, and at most one may be -1 ("the rest"). By default
            all devices are on `data`.
        devices: the devices to use, all of them by default.

    Raises:
        ConfigError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = check_mesh({"data": -1} if spec is None else dict(spec), len(devices))
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def check_mesh(spec, num_devices=None, where="mesh"):
    """`{axis: size}` for all of `AXES`; -1 is filled in once `num_devices` is known."""
    for axis, size in spec.items():
        if axis not in AXES:
            raise ConfigError(
                f"unknown mesh axis {axis!r}.{did_you_mean(axis, AXES)}",
                where,
                f"the axes are {', '.join(AXES)}",
            )
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            raise ConfigError(f"mesh.{axis} is {size!r}, expected a positive integer or -1", where)
    sizes = {axis: spec.get(axis, 1) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"only one mesh axis may be -1, got {' and '.join(free)}", where)
    if num_devices is None:
        return sizes
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % known == 0:
        sizes[free[0]] = num_devices // known
    if math.prod(sizes.values()) != num_devices:
        given = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"the mesh {given} does not use the {num_devices} devices that there are",
            where,
            "their product must be the number of devices; set one axis to -1 to fill it",
        )
    return sizes


def _suffix_match(pattern, path):
    """Optimizer and EMA leaves end in their parameter's path, so rules match the end of a path."""
    return re.fullmatch(f"(?:.*/)?(?:{pattern})", path)


def spec_for(path, shape, mesh, rules=(), itemsize=4, auto_bytes=AUTO_FSDP_BYTES):
    """The PartitionSpec of one array: first matching rule, else `fsdp` on a large array."""
    for pattern, spec in rules:
        if _suffix_match(pattern, path):
            return _fit(path, shape, mesh, spec)
    fsdp = mesh.shape["fsdp"]
    dims = [size if size % fsdp == 0 else 0 for size in shape]
    if fsdp == 1 or math.prod(shape) * itemsize <= auto_bytes or not any(dims):
        return P()
    axis = dims.index(max(dims))
    return P(*(None,) * axis, "fsdp")


def _fit(path, shape, mesh, spec):
    """`spec` right-aligned to `shape`; an axis that does not divide its dimension is dropped."""
    rank = len(shape)
    spec = (None,) * (rank - len(spec)) + tuple(spec)[max(len(spec) - rank, 0) :]
    kept = []
    for size, axes in zip(shape, spec, strict=True):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            log.warning(
                "%s: dimension %d is not divisible by %s=%d and stays whole",
                *(path, size, "x".join(names), parts),
            )
            axes = None
        kept.append(axes if parts > 1 else None)
    return P(*kept)


def shardings(tree, mesh, rules=(), auto_bytes=AUTO_FSDP_BYTES, strict=True):
    """A tree of NamedSharding for a tree of arrays or shapes.

    Args:
        tree: parameters, a train state, or their `jax.eval_shape`.
        rules: ordered `(pattern, spec)`: the first pattern that matches the end of an
            'a/b/kernel' path wins; `spec` names mesh axes (or None) and is right-aligned to the
            array's rank, so it holds for scanned layers and optimizer moments too. After them come
            `MODEL_RULES`, so that a network of this library needs none.
        auto_bytes: arrays that no rule matches are split over `fsdp` on their largest divisible
            axis when they are larger than this, else replicated.
        strict: whether a rule that matches nothing is an error.

    Raises:
        ConfigError: a rule that matches nothing, or names an axis that does not exist.
    """
    flat = trees.flatten(tree)
    if strict:
        trees.check_rules([f"(?:.*/)?(?:{p})" for p, _ in rules], flat, "sharding rules")
    for pattern, spec in rules:
        names = [n for axes in spec for n in ((axes,) if isinstance(axes, str) else axes or ())]
        for name in names:
            if name not in mesh.shape:
                raise ConfigError(
                    f"the rule {pattern!r} names the mesh axis {name!r}."
                    f"{did_you_mean(name, mesh.shape)}",
                    "sharding rules",
                    f"the axes are {', '.join(mesh.shape)}",
                )

    rules = (*rules, *MODEL_RULES)

    def place(path, leaf):
        itemsize = leaf.dtype.itemsize
        return NamedSharding(mesh, spec_for(path, leaf.shape, mesh, rules, itemsize, auto_bytes))

    return trees.map_with_path(place, tree)


def batch_sharding(mesh):
    """The leading axis of every array of a batch, split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh):
    """Whole on every device."""
    return NamedSharding(mesh, P())


def batch_parts(mesh):
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def dividing(mesh, axes, size):
    """Those of `axes`, in the mesh's order, if they divide a dimension of `size`; None if not."""
    names = tuple(name for name in mesh.axis_names if name in axes)
    parts = math.prod(mesh.shape[name] for name in names)
    return names if parts > 1 and size % parts == 0 else None


def free_axes(mesh):
    """The names of the mesh's axes that XLA spreads arrays over here; none on one device or
    inside of a `shard_map` over all of them."""
    if mesh.empty or mesh.size == 1:
        return frozenset()
    return frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)


def row_parts(rows):
    """In how many equal parts the mesh that is set holds an axis of `rows` rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = dividing(mesh, free_axes(mesh).intersection(BATCH), rows) or ()
    return math.prod(mesh.shape[name] for name in axes)


def owned_parts(mesh, process=None):
    """The parts of a batch (of `batch_parts(mesh)`) that one process's devices hold, ascending.

    Processes share a part where the `tensor` or `expert` axis spans them, and a process's parts
    need not be neighbours: a host of a TPU slice is a rectangle of it.
    """
    process = jax.process_index() if process is None else process
    sizes = [mesh.shape[axis] if axis in BATCH else 1 for axis in mesh.axis_names]
    number = np.arange(math.prod(sizes)).reshape(sizes)
    number = np.broadcast_to(number, mesh.devices.shape)
    mine = [d.process_index == process for d in mesh.devices.flat]
    return sorted({int(n) for n in number.ravel()[mine]})


def batch_rows(mesh, batch_size, process=None):
    """The rows of a global batch that one process must feed, ascending.

    Processes that hold the same part get the same rows: they must feed the same examples.

    Raises:
        ConfigError: the batch does not divide into the mesh's parts.
    """
    parts = batch_parts(mesh)
    if batch_size % parts:
        what = f"{batch_size} examples do not divide over data x fsdp = {parts}"
        raise ConfigError(what, "batch_size", f"use a multiple of {parts}")
    size = batch_size // parts
    return [part * size + row for part in owned_parts(mesh, process) for row in range(size)]


def put_batch(batch, mesh):
    """A host batch (numpy, the rows `batch_rows` of this process) as global arrays on the mesh."""
    where, parts, owned = batch_sharding(mesh), batch_parts(mesh), owned_parts(mesh)

    def place(x):
        size = len(x) // len(owned)

        def rows(index):
            first = owned.index((index[0].start or 0) // size) * size
            return x[first : first + size]

        return jax.make_array_from_callback((parts * size, *x.shape[1:]), where, rows)

    return jax.tree.map(place, batch)


def put(x, sharding):
    """A host or device array, the same in every process, as a global array."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def abstract(shapes, placed):
    """`jax.ShapeDtypeStruct`s that also say where their arrays shall lie."""
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, placed
    )


def whole(tree, keep=True):
    """`tree` with every array whole in this process; all processes must call it together.

    Arrays that are whole everywhere already are not moved. Without `keep` the result is None, and
    no more than one gathered array is held at a time.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    def gather(x):
        if x.is_fully_replicated:
            return x.addressable_data(0)
        x = multihost_utils.process_allgather(x, tiled=True)
        return x if keep else None

    gathered = jax.tree.map(gather, tree)
    return gathered if keep else None

"""Meshes and placement rules."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cnxs_jax import sharding
from cnxs_jax.errors import ConfigError


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": -1, "tensor": 2})


def test_mesh_fills_the_free_axis_and_is_auto(mesh):
    assert dict(mesh.shape) == {"expert": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.batch_parts(mesh) == 4


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"data": 3}, ("data=3", "8 devices")),
        ({"data": 3, "fsdp": -1}, ("data=3", "8 devices")),
        ({"data": -1, "fsdp": -1}, ("data and fsdp",)),
        ({"dat": 8}, ('"data"',)),
        ({"data": 0}, ("0", "positive")),
        ({"data": 2.0}, ("2.0",)),
    ],
)
def test_impossible_meshes_name_both_values(spec, words):
    with pytest.raises(ConfigError) as error:
        sharding.make_mesh(spec)
    assert all(word in str(error.value) for word in words)


def specs(tree, mesh, rules=(), **options):
    placed = sharding.shardings(tree, mesh, rules, **options)
    return jax.tree.map(lambda s: s.spec, placed)


def test_first_rule_wins_and_is_right_aligned(mesh):
    tree = {"blocks": {"q": {"kernel": jnp.zeros((3, 8, 4))}}, "q": {"kernel": jnp.zeros((8, 4))}}
    rules = ((r"q/kernel", ("fsdp", "tensor")), (r".*", (None,)))
    got = specs(tree, mesh, rules)
    assert got["blocks"]["q"]["kernel"] == P(None, "fsdp", "tensor")
    assert got["q"]["kernel"] == P("fsdp", "tensor")


def test_moments_follow_their_parameter(mesh):
    params = {"q": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}}
    state = {"params": params, "opt": optax.adamw(1e-3).init(params)}
    got = specs(state, mesh, ((r"q/kernel", ("fsdp", "tensor")),))
    assert got["opt"][0].mu["q"]["kernel"] == P("fsdp", "tensor")
    assert got["opt"][0].nu["q"]["kernel"] == P("fsdp", "tensor")
    assert got["opt"][0].count == P()
    assert got["opt"][0].mu["q"]["bias"] == P()


def test_an_axis_that_does_not_divide_is_dropped_with_a_word(mesh, caplog):
    got = specs({"q": jnp.zeros((8, 5))}, mesh, ((r"q", ("fsdp", "tensor")),))
    assert got["q"] == P("fsdp", None)
    assert "5 is not divisible by tensor=2" in caplog.text


def test_unmatched_large_arrays_go_to_fsdp_on_their_largest_axis(mesh):
    tree = {"large": jnp.zeros((3, 8, 6)), "small": jnp.zeros((2, 2)), "odd": jnp.zeros((65, 3))}
    got = specs(tree, mesh, auto_bytes=100)
    assert got == {"large": P(None, "fsdp"), "small": P(), "odd": P()}


def test_a_rule_that_matches_nothing_is_an_error(mesh):
    with pytest.raises(ConfigError, match="matches no parameter"):
        specs({"q": jnp.zeros((8, 4))}, mesh, ((r"k", ("fsdp",)),))
    assert specs({"q": jnp.zeros((8, 4))}, mesh, ((r"k", ("fsdp",)),), strict=False)["q"] == P()


def test_a_rule_with_an_unknown_axis_is_an_error(mesh):
    with pytest.raises(ConfigError, match='Did you mean "tensor"'):
        specs({"q": jnp.zeros((8, 4))}, mesh, ((r"q", ("tensr",)),))


def test_batch_rows_lie_on_data_and_fsdp(mesh):
    batch = sharding.put_batch({"x": np.arange(8.0).reshape(8, 1)}, mesh)
    rows = {tuple(np.asarray(s.data).ravel()) for s in batch["x"].addressable_shards}
    assert rows == {(0.0, 1.0), (2.0, 3.0), (4.0, 5.0), (6.0, 7.0)}


def test_rows_are_counted_in_the_parts_that_devices_hold():
    """Outside of a mesh and on axes that a `shard_map` has taken, there are none to count."""
    found = []

    def count(x):
        found.append([sharding.row_parts(rows) for rows in (8, 6, 1)])
        return x

    assert sharding.row_parts(8) == 1
    mesh = sharding.make_mesh({"expert": 2, "data": 2, "fsdp": 2})
    with jax.set_mesh(mesh):
        jax.eval_shape(jax.jit(count), jnp.zeros(8))
        for names in ({"data"}, {"expert"}, set(mesh.axis_names)):
            taken = jax.shard_map(count, in_specs=P(), out_specs=P(), axis_names=names)
            jax.eval_shape(jax.jit(taken), jnp.zeros(8))
    assert found == [[4, 1, 1], [2, 2, 1], [4, 1, 1], [1, 1, 1]]


def test_only_what_is_split_is_gathered(mesh, monkeypatch):
    split = jax.device_put(np.arange(8.0), sharding.batch_sharding(mesh))
    tree = {"split": split, "same": jax.device_put(np.arange(3.0), sharding.replicated(mesh))}
    assert sharding.whole(tree) is tree  # one process has everything
    gathered = []

    def gather(x, tiled):
        gathered.append(x)
        return np.asarray(x)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    found = sharding.whole(tree)
    assert [id(x) for x in gathered] == [id(split)]
    assert found["same"].sharding.device_set == {jax.devices()[0]}
    for name, value in tree.items():
        np.testing.assert_array_equal(found[name], value)
    assert sharding.whole(tree, keep=False) is None
    assert len(gathered) == 2  # it takes part all the same


def layout(processes, axes=("expert", "data", "fsdp", "tensor")):
    """What `owned_parts` reads of a mesh: which process each of its devices belongs to."""
    processes = np.asarray(processes)
    devices = np.array([SimpleNamespace(process_index=p) for p in processes.ravel()])
    shape = dict(zip(axes, processes.shape, strict=True))
    return SimpleNamespace(axis_names=axes, shape=shape, devices=devices.reshape(processes.shape))


def hosts(*shape, of=4):
    """Devices of a mesh of this shape, `of` neighbours a host."""
    return layout(np.arange(np.prod(shape)).reshape(shape) // of)


LAYOUTS = {  # batch of 16 rows -> the rows of each process
    "data over hosts": (hosts(1, 2, 4, 1), [range(8), range(8, 16)]),
    "one host, all of it": (hosts(1, 2, 2, 1), [range(16)]),
    "tensor over two hosts": (hosts(1, 1, 1, 8), [range(16), range(16)]),
    "tensor over two hosts of four": (
        hosts(1, 2, 1, 8), [range(8), range(8), range(8, 16), range(8, 16)]),
    "experts over hosts": (hosts(2, 1, 4, 1), [range(16), range(16)]),
    "a host is a square of data x fsdp": (
        layout([[[[0], [0], [1], [1]], [[0], [0], [1], [1]]]]),
        [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
    "tensor across, fsdp within": (
        layout([[[[0, 1], [0, 1]], [[2, 3], [2, 3]]]]),
        [range(8), range(8), range(8, 16), range(8, 16)]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_process_feeds_the_rows_of_its_own_devices(name):
    mesh, expected = LAYOUTS[name]
    found = [sharding.batch_rows(mesh, 16, process) for process in range(len(expected))]
    assert found == [list(rows) for rows in expected]
    assert {row for rows in found for row in rows} == set(range(16))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="12 examples do not divide over data x fsdp = 8"):
        sharding.batch_rows(hosts(1, 2, 4, 1), 12, 0)


@pytest.mark.parametrize("process", [0, 1])
def test_local_rows_land_on_the_shards_that_they_belong_to(process, monkeypatch):
    """Every device of a process that owns parts 0, 1, 4, 5 of 8 gets its own rows."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    twin = layout([[[[0], [0], [1], [1]], [[0], [0], [1], [1]]]])
    rows = sharding.batch_rows(twin, 16, process)
    asked = {}

    def make(shape, where, callback):
        assert shape == (16, 3)
        for device, index in where.devices_indices_map(shape).items():
            place = np.argwhere(mesh.devices == device)[0]
            if twin.devices[tuple(place)].process_index == process:
                asked[device] = (index[0], callback(index))

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    monkeypatch.setattr(sharding, "owned_parts", lambda _, owned=sharding.owned_parts: owned(
        twin, process))  # fmt: skip
    whole = np.arange(48.0).reshape(16, 3)
    sharding.put_batch({"x": whole[rows]}, mesh)
    assert len(asked) == 4
    for index, local in asked.values():
        np.testing.assert_array_equal(local, whole[index])

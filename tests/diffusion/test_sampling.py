"""The sampling loop: the scan, the expert column, guided rows, noise, tracing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnxs_jax.diffusion import experts, guidance, sampling, schedule, solvers
from cnxs_jax.errors import ConfigError
from tests.diffusion.toy import replay

LINEAR = schedule.linear()
SHAPE = (3, 4, 4, 2)
X = jax.random.normal(jax.random.key(0), SHAPE)
NOISE = jax.random.normal(jax.random.key(1), (10, *SHAPE))
PARAMS = {"w": jnp.array([[0.5, -0.3], [0.2, 0.4]])}
OTHER = {"w": jnp.array([[-0.6, 0.1], [0.3, 0.2]])}
TABLES = {
    "ddim": solvers.ddim(LINEAR, 10),
    "ddim eta": solvers.ddim(LINEAR, 10, eta=1.0),
    "ddpm": solvers.ddpm(LINEAR, 10),
    "euler": solvers.euler(LINEAR, 10),
    "dpmpp": solvers.dpmpp(LINEAR, 10),
    "deis": solvers.deis(LINEAR, 10, order=3),
    "lcm": solvers.lcm(LINEAR, 10),
    "edm": solvers.dpmpp(schedule.edm(), 10),
}


def network(params, x, t, cond):
    """Nonlinear, mixes channels and reads the time; a learned range behind the prediction."""
    out = jnp.tanh(x @ params["w"] + jnp.sin(t / 300)[:, None, None, None])
    if "shift" in cond:
        out = out + cond["shift"][:, None, None, None]
    return jnp.concatenate([out, 7.0 + out], axis=-1)


def in_numpy(params):
    def call(x, t):
        return np.tanh(x @ np.asarray(params["w"], np.float64) + np.sin(t / 300))

    return call


@pytest.mark.parametrize("name", TABLES)
def test_loop_equals_its_rows_written_out(name):
    table = TABLES[name]
    with jax.default_matmul_precision("highest"):
        got = sampling.sample(network, PARAMS, X, {}, table, noise=NOISE)
    call = in_numpy(PARAMS)
    want = replay(table, lambda x, i: call(x, table.t[i]), X, np.asarray(NOISE, np.float64))
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", ["dpmpp", "deis"])
def test_each_row_runs_its_own_expert_and_history_crosses_the_switch(name):
    table = experts.route(TABLES[name], [300, 700], by="t")
    assert set(table.expert) == {0, 1, 2}
    trees = (PARAMS, OTHER, PARAMS)
    with jax.default_matmul_precision("highest"):
        got = sampling.sample(network, trees, X, {}, table)
    want = replay(table, lambda x, i: in_numpy(trees[table.expert[i]])(x, table.t[i]), X)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    single = replay(table, lambda x, i: in_numpy(PARAMS)(x, table.t[i]), X)
    assert np.abs(want - single).max() > 0.05 * np.abs(want).max()


@pytest.mark.parametrize("name", ["ddim eta", "dpmpp", "deis"])
def test_copies_of_one_expert_equal_the_single_model_bit_for_bit(name):
    table = TABLES[name]
    routed = experts.route(table, [300, 700], by="t")

    @jax.jit
    def run(params, table):
        return sampling.sample(network, params, X, {}, table, key=jax.random.key(3))

    copies = run((PARAMS,) * 3, routed)
    np.testing.assert_array_equal(copies, run(PARAMS, table))


def test_experts_may_differ_in_network_and_condition():
    """Expert 1 reads a key that expert 0 does not have, and is another function."""
    table = experts.route(solvers.ddim(LINEAR, 4), [500], by="t")
    seen = []

    def first(params, x, t, cond):
        seen.append(("first", sorted(cond)))
        return network(params, x, t, cond)

    def second(params, x, t, cond):
        seen.append(("second", sorted(cond)))
        return network(params, x, t, cond)[..., :2]

    sampling.sample((first, second), (PARAMS, OTHER), X, ({}, {"shift": jnp.ones(3)}), table)
    assert set(map(str, seen)) == {"('first', ['sigma'])", "('second', ['shift', 'sigma'])"}


def test_missing_experts_are_refused():
    table = experts.route(solvers.ddim(LINEAR, 4), [300, 700], by="t")
    with pytest.raises(ConfigError, match="3 experts"):
        sampling.sample(network, (PARAMS, OTHER), X, {}, table)
    with pytest.raises(ConfigError, match="several experts"):
        sampling.sample(network, PARAMS, X, {}, table)


class Spy:
    """A denoiser that notes the batch sizes it is traced with and its calls of `prepare`."""

    def __init__(self):
        self.batches, self.prepared = [], []

    def __call__(self, params, x, t, cond):
        self.batches.append(x.shape[0])
        assert "hoisted" in cond
        return network(params, x, t, cond)

    def prepare(self, params, cond):
        self.prepared.append(cond["shift"].shape[0])
        return {**cond, "hoisted": cond["shift"] * 2}


COND = {
    "shift": jnp.array([0.1, 0.2, 0.3]),
    "guidance_scale": jnp.array([1.0, 3.0, 5.0]),
    "null": {"shift": jnp.zeros(3)},
}


def test_rows_without_guidance_evaluate_half_the_batch():
    table = solvers.ddim(LINEAR, 10)
    spy = Spy()
    sampling.sample(guidance.cfg(spy), PARAMS, X, COND, table)
    assert set(spy.batches) == {6}
    spy = Spy()
    off = table.with_guidance_off(0.0, 1.0)
    got = sampling.sample(guidance.cfg(spy), PARAMS, X, COND, off)
    assert set(spy.batches) == {6, 3}
    spy = Spy()
    sampling.sample(guidance.cfg(spy), PARAMS, X, COND, table.with_guidance_off(0.0, 1e9))
    assert set(spy.batches) == {3}

    call = in_numpy(PARAMS)
    shift, scale = (np.asarray(COND[k]).reshape(3, 1, 1, 1) for k in ("shift", "guidance_scale"))

    def mixed(x, i):
        return call(x, off.t[i]) + (scale if off.guided[i] else 1.0) * shift

    want = replay(off, mixed, X)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def test_prepare_runs_once_before_the_scan():
    """Once for each expert and kind of row, not once a row or a segment."""
    spy = Spy()
    sampling.sample(guidance.cfg(spy), PARAMS, X, COND, solvers.ddim(LINEAR, 10))
    assert spy.prepared == [6]
    spy = Spy()
    table = replace(solvers.ddim(LINEAR, 10), guided=(True, False) * 5)
    sampling.sample(guidance.cfg(spy), PARAMS, X, COND, table)
    assert sorted(spy.prepared) == [3, 6]


def test_no_segment_is_split_for_guidance_that_is_absent():
    table = replace(solvers.ddim(LINEAR, 10), guided=(True, False) * 5)
    text = str(jax.make_jaxpr(lambda x: sampling.sample(network, PARAMS, x, {}, table))(X))
    assert text.count("scan[") == 1


def test_numbers_of_the_table_never_recompile():
    traces = []

    @jax.jit
    def run(table, scale):
        traces.append(1)
        cond = COND | {"guidance_scale": scale, "control_scale": jnp.ones(3)}
        return sampling.sample(guidance.cfg(network), PARAMS, X, cond, table, jax.random.key(0))

    one, many = jnp.ones(3), jnp.full(3, 7.0, jnp.float32)
    outs = [
        run(solvers.ddim(LINEAR, 8), one),
        run(solvers.ddim(LINEAR, 8), many),
        run(solvers.ddim(LINEAR, 8, timestep_rule="trailing").with_control(0.2, 0.7), one),
        run(solvers.euler(LINEAR, 8, karras=True), one),
        run(solvers.ddim(schedule.scaled_linear(), 8, prediction="v_prediction"), one),
    ]
    assert len(traces) == 1
    assert all(np.abs(a - outs[0]).max() > 1e-3 for a in outs[1:])
    run(experts.route(solvers.ddim(LINEAR, 8), [2000.0]), one)  # all rows still expert 0
    run(solvers.ddim(LINEAR, 8).with_guidance_off(0.0, 1.0), one)
    assert len(traces) == 2


def test_a_picture_does_not_depend_on_its_batch():
    key, name = jax.random.key(5), "lcm"
    run = jax.jit(lambda x, key: sampling.sample(network, PARAMS, x, {}, TABLES[name], key=key))
    batch = run(X, key)
    own = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(3))
    np.testing.assert_array_equal(run(X, own), batch)
    for i in range(3):
        np.testing.assert_allclose(run(X[i : i + 1], own[i : i + 1])[0], batch[i], rtol=1e-5)
    assert np.abs(run(X, own[::-1])[0] - batch[0]).max() > 0.1
    # Rows draw anew: with one noise for all of them the result would be this.
    once = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 0), SHAPE[1:]))(own)
    same = sampling.sample(network, PARAMS, X, {}, TABLES[name], noise=jnp.stack([once] * 10))
    assert np.abs(same - batch).max() > 0.1


def test_raw_keys_are_keys():
    run = jax.jit(lambda key: sampling.sample(network, PARAMS, X, {}, TABLES["lcm"], key=key))
    np.testing.assert_array_equal(run(jax.random.PRNGKey(5)), run(jax.random.key(5)))


def test_noise_must_come_from_somewhere():
    with pytest.raises(ConfigError, match="neither key nor noise"):
        sampling.sample(network, PARAMS, X, {}, TABLES["ddim eta"])
    with pytest.raises(ConfigError, match="noise"):
        sampling.sample(network, PARAMS, X, {}, TABLES["ddim eta"], noise=NOISE[:9])
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ConfigError, match="3 keys"):
        sampling.sample(network, PARAMS, X, {}, TABLES["ddim eta"], key=keys)
    sampling.sample(network, PARAMS, X, {}, solvers.lcm(LINEAR, 1))  # adds none


def test_rows_write_noise_level_and_control():
    """A network that outputs what it reads, as x0: the last row's values come out."""

    def reader(params, x, t, cond):
        scale = cond["control_scale"]
        first, second = scale if isinstance(scale, tuple) else (scale, scale)
        read = jnp.stack([cond["sigma"] + 10 * first, cond["sigma"] + 10 * second], axis=-1)
        return jnp.broadcast_to(read[:, None, None], x.shape)

    table = solvers.ddim(LINEAR, 5, prediction="sample")
    last = table.sigma[-1]
    scale = jnp.array([0.0, 1.0, 2.0])

    def run(table, scale):
        out = sampling.sample(reader, {}, X, {"control_scale": scale}, table)
        return np.asarray(out)[:, 0, 0] - last

    np.testing.assert_allclose(run(table, scale)[:, 0], [0, 10, 20], atol=1e-5)
    np.testing.assert_allclose(run(table.with_control(0.0, 0.5), scale), 0.0, atol=1e-5)
    two = table.with_control([0.0, 0.5], [0.5, 1.0])
    pair = run(two, (scale, scale))
    np.testing.assert_allclose(pair[:, 0], 0.0, atol=1e-5)
    np.testing.assert_allclose(pair[:, 1], [0, 10, 20], atol=1e-5)


def test_post_acts_on_x0():
    table = TABLES["dpmpp"]
    got = sampling.sample(network, PARAMS, X, {}, table, post=lambda x0: jnp.clip(x0, -0.1, 0.1))
    assert np.abs(got).max() <= 0.1 + 1e-6
    assert np.abs(sampling.sample(network, PARAMS, X, {}, table)).max() > 0.2


def test_half_precision_networks_leave_the_solver_in_float32():
    half = sampling.sample(
        lambda p, x, t, c: network(p, x, t, c).astype(jnp.bfloat16), PARAMS, X, {}, TABLES["ddim"]
    )
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("name", ["ddpm", "deis"])
def test_the_loop_lowers_for_tpu(name):
    table = experts.route(TABLES[name], [500], by="t").with_guidance_off(0.0, 1.0)

    def run(params, table, key):
        return sampling.sample(guidance.cfg(network), params, X, COND, table, key=key)

    traced = jax.jit(run).trace((PARAMS, OTHER), table, jax.random.key(0))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.while") >= 2  # one loop a segment

"""Intervals of the noise distribution, draws from one of them, and routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cnxs_jax.diffusion import expert_tree as tree
from cnxs_jax.diffusion import sampling, schedule, solvers
from cnxs_jax.errors import ConfigError

LEVELS = tree.LogNormal()
PUBLISHED = tree.cover([(9, 511), (3, 0)])
EDM = schedule.edm()


def test_published_ensemble_has_the_closed_form_edges():
    """exp(-1.2 + 1.2 z) with z the normal quantiles of 1/8 and 511/512."""
    assert [e.name for e in PUBLISHED] == ["E[3,0]", "C[0.125,0.998047]", "E[9,511]"]
    assert [e.mass for e in PUBLISHED] == [1 / 8, 1 - 1 / 8 - 1 / 512, 1 / 512]
    want = stats.lognorm(s=1.2, scale=np.exp(-1.2)).ppf([1 / 8, 511 / 512])
    np.testing.assert_allclose(tree.edges(PUBLISHED, LEVELS), want, rtol=1e-12)
    np.testing.assert_allclose(want, [0.0757, 9.610], rtol=1e-3)


@pytest.mark.parametrize("level", [0, 1, 4, 9, 30])
def test_nodes_of_a_level_are_equal_and_share_their_edges(level):
    indices = {0, 2**level // 2, 2**level - 1}
    for i in indices:
        node = tree.node(level, i)
        assert node.mass == 2.0**-level
        assert i == 0 or node.low == tree.node(level, i - 1).high
        assert LEVELS.quantile(LEVELS.edge(node.low)) == pytest.approx(node.low, abs=1e-12)


def test_every_level_has_one_owner():
    assert tree.cover([]) == (tree.Interval(0.0, 1.0, "C[0,1]"),)
    three = tree.cover([(2, 1)])
    assert [(e.low, e.high) for e in three] == [(0, 0.25), (0.25, 0.5), (0.5, 1)]
    assert len(tree.cover([(1, 0), (1, 1)])) == 2
    assert [e.mass for e in tree.check_cover(tree.equal(7))] == pytest.approx([1 / 7] * 7)


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([tree.node(1, 0)], "no expert has .*0.5, 1.*to the end"),
        ([tree.node(1, 1)], "no expert has .*0, 0.5.*from the start"),
        ([tree.node(2, 0), tree.node(1, 1)], "no expert has .*0.25, 0.5"),
        ([tree.node(1, 0), tree.node(2, 1), tree.node(1, 1)], "overlap"),
        ([tree.WHOLE, tree.node(1, 0)], "overlap"),
        ([], "no experts"),
    ],
)
def test_gaps_and_overlaps_are_refused(intervals, message):
    with pytest.raises(ConfigError, match=message):
        tree.check_cover(intervals)


@pytest.mark.parametrize("bad", [(3, 8), (-1, 0), (2, -1)])
def test_nodes_outside_the_tree_are_refused(bad):
    with pytest.raises(ConfigError, match="no node"):
        tree.node(*bad)


@pytest.mark.parametrize("expert", [*PUBLISHED, tree.WHOLE])
def test_truncated_levels_have_scipys_quantiles(expert):
    u = (np.arange(1, 200) / 200).astype(np.float32)
    low, high = stats.norm.ppf([expert.low, expert.high])
    want = np.exp(-1.2 + 1.2 * stats.truncnorm(low, high).ppf(u))
    got = LEVELS.from_uniform(u, expert.low, expert.high)
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize("expert", PUBLISHED)
def test_draws_stay_inside_and_follow_the_truncated_distribution(expert):
    keys = jax.random.split(jax.random.key(0), 4000)
    sigma = np.asarray(jax.vmap(lambda k: LEVELS.draw(k, expert.low, expert.high))(keys))
    assert sigma.min() >= LEVELS.edge(expert.low) * (1 - 1e-5)
    assert sigma.max() <= LEVELS.edge(expert.high) * (1 + 1e-5)
    assert len(np.unique(sigma)) > 3900  # the top 1/512 too, in float32
    uniform = (LEVELS.quantile(sigma) - expert.low) / expert.mass
    assert stats.kstest(uniform, "uniform").pvalue > 0.01


def test_the_extreme_uniform_numbers_give_finite_levels():
    u = jnp.array([0.0, 1.0 - 2.0**-23]) + tree.HALF_STEP
    levels = LEVELS.from_uniform(u)
    assert np.all(np.isfinite(levels))
    assert np.all(levels > 0)


def test_a_traced_interval_gives_the_same_numbers():
    """Experts that train side by side hold their interval in an array."""
    key, limits = jax.random.key(4), jnp.array([511 / 512, 1.0])
    traced = jax.jit(lambda limits: LEVELS.draw(key, *limits))(limits)
    np.testing.assert_allclose(traced, LEVELS.draw(key, 511 / 512, 1.0), rtol=1e-5)


def test_margin_widens_by_a_part_of_the_own_mass_and_stops_at_the_ends():
    assert tree.node(2, 1).with_margin(0.5) == (0.125, 0.625)
    assert tree.node(9, 511).with_margin(0.25) == (1 - 1.25 / 512, 1.0)
    assert tree.node(3, 0).with_margin(0.0) == (0.0, 0.125)
    with pytest.raises(ConfigError, match="margin"):
        tree.node(3, 0).with_margin(-0.1)


def test_times_are_cut_at_equal_probability():
    times = tree.Times(1000)
    np.testing.assert_array_equal(tree.edges(PUBLISHED, times), [125, 998])
    assert times.limits(*PUBLISHED[2].with_margin(0.0)) == (998, 1000)
    with pytest.raises(ConfigError, match="hold none"):
        tree.edges(PUBLISHED, tree.Times(100))


def test_logit_normal_times_halve_in_probability_and_not_in_time():
    times = tree.Times(1000, logit_normal=(1.0, 1.0))
    assert times.edge(0.5) == round(1000 / (1 + np.exp(-1.0)))
    keys = jax.random.split(jax.random.key(1), 4000)
    whole = np.asarray(jax.vmap(times.draw)(keys))
    first, end = times.limits(0.5, 1.0)
    assert np.mean(whole >= first) == pytest.approx(0.5, abs=0.03)
    upper = np.asarray(jax.vmap(lambda k: times.draw(k, 0.5, 1.0))(keys))
    assert first <= upper.min()
    assert upper.max() < end
    assert stats.ks_2samp(upper, whole[whole >= first]).pvalue > 0.01


def test_rows_go_to_the_expert_that_owns_their_noise_level():
    """25 steps on the EDM grid: 9 rows, 11 rows and 5 rows, from high noise to low."""
    table = tree.route(solvers.deis(EDM, 25, order=3), PUBLISHED, LEVELS)
    assert table.expert == (2,) * 9 + (1,) * 11 + (0,) * 5
    sigma = np.asarray(table.sigma)
    owners = np.array(table.expert)
    for i, expert in enumerate(PUBLISHED):
        own = LEVELS.quantile(sigma[owners == i])
        assert np.all((own >= expert.low) & (own < expert.high))


def test_a_level_on_the_edge_belongs_to_the_noisier_expert():
    edge = LEVELS.edge(0.125)
    table = solvers.ddim(schedule.edm(edge, 80.0), 3)
    assert tree.route(table, PUBLISHED, LEVELS).expert[-1] == int(table.sigma[-1] >= edge)
    times = tree.route(solvers.ddim(schedule.linear(), 8), tree.equal(2), tree.Times(1000))
    assert times.expert == tuple(int(t >= 500) for t in times.t)
    assert 500 in times.t


def network(params, x, t, cond):
    return params["a"] * x / (1.0 + t[:, None, None, None] ** 2)


@pytest.mark.parametrize("solver", [solvers.deis, solvers.dpmpp, solvers.euler])
def test_experts_that_are_copies_equal_the_single_model_bit_for_bit(solver):
    """Multistep history crosses the switch: otherwise the rows behind it would differ."""
    table = solver(EDM, 25)
    routed = tree.route(table, PUBLISHED, LEVELS)
    x, params = jax.random.normal(jax.random.key(0), (2, 4, 4, 3)), {"a": jnp.float32(0.9)}

    def run(params, table):
        return jax.jit(lambda p, t: sampling.sample(network, p, x, {}, t))(params, table)

    copies = tuple(jax.tree.map(jnp.array, params) for _ in PUBLISHED)
    np.testing.assert_array_equal(run(copies, routed), run(params, table))
    other = (*copies[:2], {"a": jnp.float32(0.5)})
    assert np.abs(run(other, routed) - run(params, table)).max() > 1e-3

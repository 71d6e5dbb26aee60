"""Solver tables: exact answers on a Gaussian, known times, static columns, refused options."""

import numpy as np
import pytest

from cnxs_jax.diffusion import experts, schedule, solvers
from cnxs_jax.diffusion.integrals import lagrange_integrals
from cnxs_jax.errors import ConfigError
from tests.diffusion.toy import STD, gaussian_error, replay

LINEAR = schedule.linear()
EDM = schedule.edm()


def order(make, low, high, edm=False):
    """Measured order of convergence between two step counts."""
    errors = [gaussian_error(make(n), edm) for n in (low, high)]
    return np.log(errors[0] / errors[1]) / np.log(high / low)


def test_ddim_converges_at_first_order():
    measured = order(lambda n: solvers.ddim(LINEAR, n, timestep_rule="trailing"), 25, 100)
    assert 0.8 < measured < 1.3


def test_2m_converges_at_second_order():
    def make(steps, order):
        return solvers.dpmpp(EDM, steps, order=order, final_sigma="sigma_min")

    assert 0.8 < order(lambda n: make(n, 1), 50, 200, edm=True) < 1.2
    assert 1.7 < order(lambda n: make(n, 2), 50, 200, edm=True) < 2.4


@pytest.mark.parametrize(("degree", "low", "high"), [(1, 0.8, 1.3), (2, 1.7, 2.5)])
@pytest.mark.parametrize("variable", ["log_rho", "rho"])
def test_adams_bashforth_order(degree, low, high, variable):
    measured = order(lambda n: solvers.ab(EDM, n, degree, variable), 60, 240, edm=True)
    assert low < measured < high


@pytest.mark.parametrize("variable", ["log_rho", "rho"])
def test_third_order_is_more_exact(variable):
    """Its first two steps have lower order, so the order itself is not three."""
    second, third = (gaussian_error(solvers.ab(EDM, 60, k, variable), edm=True) for k in (2, 3))
    assert third < 0.5 * second


@pytest.mark.parametrize("variable", ["log_rho", "rho"])
def test_integrals_are_exact_for_polynomials(variable):
    """Order K integrates every polynomial of degree K - 1, by comparison with a fine sum."""
    nodes, start, end = np.array([2.0, 3.5, 7.0]), 2.0, 0.4
    u = np.log if variable == "log_rho" else np.asarray
    fine = np.linspace(start, end, 200_001)
    for degree in range(3):
        exact = np.trapezoid(u(fine) ** degree, fine)
        weights = lagrange_integrals(nodes, start, end, variable)
        assert weights @ u(nodes) ** degree == pytest.approx(exact, rel=1e-8)


def test_2m_beats_first_order_on_a_log_snr_grid():
    first, second = (solvers.dpmpp(LINEAR, 20, order=k, lambdas=True) for k in (1, 2))
    assert gaussian_error(second) < 0.2 * gaussian_error(first)


def test_few_steps_end_at_first_order():
    """Without it the last 2M step extrapolates over a jump: worse in a ten-step run."""
    options = dict(final_sigma="sigma_min", timestep_rule="linspace")
    kept = solvers.dpmpp(LINEAR, 10, lower_order_final=True, **options)
    free = solvers.dpmpp(LINEAR, 10, lower_order_final=False, **options)
    assert kept.b[-1, 1] == 0.0
    assert free.b[-1, 1] != 0.0
    np.testing.assert_array_equal(kept.b[:-1], free.b[:-1])


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("rule", ["diffusers", "official"])
def test_lcm_keeps_the_standard_deviation(num_steps, rule):
    """With the exact consistency function every number of steps gives the data's spread."""
    table = solvers.lcm(LINEAR, num_steps, timestep_rule=rule, prediction="sample")
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(num_steps + 1, 40_000))

    def consistent(x, i):
        alpha = 1 / np.sqrt(1 + table.sigma[i] ** 2)
        spread = np.sqrt(alpha**2 * STD**2 + (alpha * table.sigma[i]) ** 2)
        return STD * x / spread

    out = replay(table, consistent, noise[-1], noise)
    assert out.std() == pytest.approx(STD, rel=0.015)


def test_ddpm_keeps_the_data_distribution():
    table = solvers.ddpm(LINEAR, 1000, prediction="sample")
    rng = np.random.default_rng(0)

    def network(x, i):
        alpha = 1 / np.sqrt(1 + table.sigma[i] ** 2)
        return STD**2 * alpha / (alpha**2 * STD**2 + (alpha * table.sigma[i]) ** 2) * x

    out = replay(table, network, rng.normal(size=4000), rng.normal(size=(1000, 4000)))
    assert out.std() == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize(
    ("rule", "num_steps", "times"),
    [
        ("diffusers", 1, [999]),
        ("diffusers", 3, [999, 679, 339]),
        ("diffusers", 4, [999, 759, 499, 259]),
        ("diffusers", 8, [999, 879, 759, 639, 499, 379, 259, 139]),
        ("official", 3, [999, 679, 359]),
        ("official", 4, [999, 759, 519, 279]),
        ("official", 8, [999, 879, 759, 639, 519, 399, 279, 159]),
    ],
)
def test_lcm_times(rule, num_steps, times):
    assert solvers.lcm(LINEAR, num_steps, timestep_rule=rule).t.tolist() == times


def test_edm_tables_take_x0_at_noise_levels():
    for table in (solvers.euler(EDM, 8), solvers.dpmpp(EDM, 8), solvers.ab(EDM, 8)):
        assert table.p.tolist() == [0.0] * 8
        assert table.q.tolist() == [1.0] * 8
        np.testing.assert_array_equal(table.t, table.sigma)
        assert table.sigma[[0, -1]] == pytest.approx([80.0, 0.002])
        assert table.init_scale == 80.0
    assert solvers.euler(EDM, 8).a[-1] == 0.0  # to noise level zero: x is the last x0
    np.testing.assert_array_equal(solvers.ddim(EDM, 8).b, solvers.euler(EDM, 8).b)


def test_control_gate():
    """Ten rows, from 20 % to 60 %: rows 2 to 5."""
    table = solvers.ddim(LINEAR, 10)
    assert table.control.tolist() == [1.0] * 10
    gated = table.with_control(0.2, 0.6)
    assert np.flatnonzero(gated.control).tolist() == [2, 3, 4, 5]
    both = table.with_control([0.0, 0.5], [0.3, 1.0])
    assert np.flatnonzero(both.control[:, 0]).tolist() == [0, 1, 2]
    assert np.flatnonzero(both.control[:, 1]).tolist() == [5, 6, 7, 8, 9]


def test_guidance_off_halves_the_cost_of_its_rows():
    table = solvers.ddim(LINEAR, 10)
    assert table.num_evaluations() == 20
    assert table.num_evaluations(guidance=False) == 10
    off = table.with_guidance_off(0.0, 1.0)
    assert off.guided == tuple(bool(s >= 1.0) for s in table.sigma)
    assert off.num_evaluations() == 10 + sum(off.guided) < 20


def test_route_covers_every_time_once():
    table = solvers.ddim(LINEAR, 1000)
    routed = experts.route(table, [100, 927], by="t")
    by_time = dict(zip(table.t.astype(int).tolist(), routed.expert, strict=True))
    assert [by_time[t] for t in (0, 99, 100, 926, 927, 999)] == [0, 0, 1, 1, 2, 2]
    assert [routed.expert.count(e) for e in range(3)] == [100, 827, 73]
    by_level = experts.route(table, LINEAR.noise_levels[[100, 927]])
    assert by_level.expert == routed.expert


@pytest.mark.parametrize(
    "call",
    [
        lambda: solvers.ddim(LINEAR, 0),
        lambda: solvers.ddim(LINEAR, 1001),
        lambda: solvers.ddim(LINEAR, 2.5),
        lambda: solvers.ddim(LINEAR, True),
        lambda: solvers.ddim(LINEAR, 1000, steps_offset=1),
        lambda: solvers.ddim(LINEAR, 10, eta=1.5),
        lambda: solvers.ddim(LINEAR, 10, timestep_rule="trailling"),
        lambda: solvers.ddim(LINEAR, 10, prediction="eps"),
        lambda: solvers.ddim(LINEAR, 10, final_alpha="zero"),
        lambda: solvers.dpmpp(LINEAR, 1000),
        lambda: solvers.dpmpp(LINEAR, 10, order=3),
        lambda: solvers.dpmpp(LINEAR, 10, karras=True, lambdas=True),
        lambda: solvers.ab(LINEAR, 10, order=4),
        lambda: solvers.lcm(LINEAR, 51),
        lambda: solvers.lcm(LINEAR, 4, original_steps=2000),
        lambda: solvers.lcm(EDM, 4),
        lambda: solvers.euler(EDM, 4, prediction="epsilon"),
        lambda: solvers.ddim(LINEAR, 4).with_control(0.5, 0.2),
        lambda: solvers.ddim(LINEAR, 4).with_guidance_off(2.0, 1.0),
        lambda: experts.route(solvers.ddim(LINEAR, 4), [5.0, 1.0]),
    ],
)
def test_impossible_options_are_refused(call):
    with pytest.raises(ConfigError):
        call()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
        ({}, "None"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "rescale"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "linera"}, 'mean "linear"'),
        ({"_class_name": "DDIMScheduler", "timestep_spacng": "linspace"}, "timestep_spacing"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "learned_range"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "order"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "algorithm_type",
        ),
    ],
)
def test_configurations_that_no_table_expresses_are_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        solvers.from_config(config, 4)


def test_fields_of_other_schedulers_are_ignored():
    """As SDXL ships it: an Euler configuration with DDIM's and PNDM's fields."""
    config = {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    }
    table = solvers.from_config(config, 10)
    assert table.t.tolist() == list(range(901, 0, -100))
    assert table.init_scale == 1.0

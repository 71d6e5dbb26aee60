"""Every solver table against diffusers' scheduler of the same name, same network, same noise.

diffusers computes abar in float32, where `1 - abar` at the first times is off by up to 1e-4; ours
is float64. The full matrix therefore gives both sides diffusers' abar, so that the solvers are
compared; `test_own_schedule` compares the whole, each side with its own schedule.
"""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cnxs_jax.diffusion import sampling, schedule, solvers
from cnxs_jax.diffusion.scheduler_config import _CLASSES
from cnxs_jax.pipelines import scheduler as schedulers

pytestmark = pytest.mark.parity

STEPS = (1, 2, 4, 10, 14, 50)
SHAPE = (2, 4, 4, 3)
TOLERANCE = 1e-5
RNG = np.random.default_rng(0)
WEIGHT = (RNG.normal(size=(3, 3)) * 0.7).astype(np.float32)
START = RNG.normal(size=SHAPE).astype(np.float32)
NOISE = RNG.normal(size=(50, *SHAPE)).astype(np.float32)
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def network_torch(x, t):
    t = torch.as_tensor(float(t), dtype=x.dtype) / 1000
    return torch.tanh(x @ torch.from_numpy(WEIGHT).to(x.dtype) + t) + 0.3 * x * torch.cos(3 * t)


def network_jax(params, x, t, cond):
    t = (t / 1000)[:, None, None, None]
    return jnp.tanh(x @ WEIGHT + t) + 0.3 * x * jnp.cos(3 * t)


@jax.jit
def run_jax(table, noise):
    with jax.default_matmul_precision("highest"):
        return sampling.sample(network_jax, {}, jnp.asarray(START), {}, table, noise=noise)


def run_torch(scheduler, num_steps, monkeypatch, eta=None, dtype=torch.float32):
    """diffusers' own loop, with its random numbers replaced by NOISE in order."""
    scheduler.set_timesteps(num_steps)
    drawn = iter(NOISE)
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.from_numpy(next(drawn)))
    x = torch.from_numpy(START).to(dtype) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = network_torch(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **({} if eta is None else {"eta": eta})).prev_sample
    return x.numpy()


def check(
    scheduler, num_steps, monkeypatch, eta=None, own_schedule=False, dtype=torch.float32, **options
):
    """Through the written configuration, so that `from_config` is what is compared."""
    if not own_schedule:
        options["schedule"] = schedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy())
    config = json.loads(scheduler.to_json_string())
    if eta is not None:
        options["eta"] = eta
    table = solvers.from_config(config, num_steps, **options)
    ours = np.asarray(run_jax(table, jnp.asarray(NOISE[: len(table)])))
    theirs = run_torch(scheduler, num_steps, monkeypatch, eta, dtype)
    assert np.isfinite(ours).all()
    relative = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert relative <= TOLERANCE, f"{relative:.2e}"


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim(num_steps, spacing, eta, prediction, monkeypatch):
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing=spacing, prediction_type=prediction
    )
    check(scheduler, num_steps, monkeypatch, eta)


@pytest.mark.parametrize("num_steps", STEPS)
def test_ddim_as_stable_diffusion_ships_it(num_steps, monkeypatch):
    scheduler = diffusers.DDIMScheduler(
        **SD, clip_sample=False, steps_offset=1, set_alpha_to_one=False
    )
    check(scheduler, num_steps, monkeypatch, 0.0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 14, 49])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_pndm_as_stable_diffusion_ships_it(num_steps, spacing, monkeypatch):
    offset = int(spacing == "leading")
    scheduler = diffusers.PNDMScheduler(
        **SD, skip_prk_steps=True, steps_offset=offset, timestep_spacing=spacing
    )
    check(scheduler, num_steps, monkeypatch)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm(num_steps, spacing, variance, prediction, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        clip_sample=False,
        timestep_spacing=spacing,
        variance_type=variance,
        prediction_type=prediction,
    )
    check(scheduler, num_steps, monkeypatch)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler(num_steps, spacing, karras, prediction, monkeypatch):
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD, timestep_spacing=spacing, use_karras_sigmas=karras, prediction_type=prediction
    )
    check(scheduler, num_steps, monkeypatch)


DPM = {
    "default": {},
    "order 1": dict(solver_order=1),
    "full order at the end": dict(lower_order_final=False),
    "sigma_min": dict(final_sigmas_type="sigma_min"),
    "sigma_min, full order": dict(final_sigmas_type="sigma_min", lower_order_final=False),
    "karras": dict(use_karras_sigmas=True),
    "lambdas": dict(use_lu_lambdas=True),
    "trailing": dict(timestep_spacing="trailing"),
    "leading": dict(timestep_spacing="leading", steps_offset=1),
    "v": dict(prediction_type="v_prediction"),
    "sample": dict(prediction_type="sample"),
    "stable diffusion": SD,
}


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", DPM)
def test_dpmpp(num_steps, name, monkeypatch):
    check(diffusers.DPMSolverMultistepScheduler(**DPM[name]), num_steps, monkeypatch)


DEIS = {
    "default": {},
    "order 1": dict(solver_order=1),
    "order 3": dict(solver_order=3),
    "order 3, full order at the end": dict(solver_order=3, lower_order_final=False),
    "karras": dict(use_karras_sigmas=True),
    "karras, order 3": dict(use_karras_sigmas=True, solver_order=3),
    "trailing": dict(timestep_spacing="trailing"),
    "v": dict(prediction_type="v_prediction"),
}


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("name", DEIS)
def test_deis(num_steps, name, monkeypatch):
    """Against diffusers in float64: in float32 its own cancellation costs it up to 2.5e-4.

    Its noise levels stay the float32 ones; only the arithmetic on them is widened.
    """
    scheduler = diffusers.DEISMultistepScheduler(**DEIS[name])
    plain = scheduler.set_timesteps

    def set_timesteps(n):
        plain(n)
        scheduler.sigmas = scheduler.sigmas.double()
        if "karras" in name and n == 1:
            # diffusers repeats the last level, which makes its only step return the noise.
            scheduler.sigmas[1] = ((1 - scheduler.alphas_cumprod[0]) ** 0.5).double()
            scheduler.sigmas[1] /= scheduler.alphas_cumprod[0].double() ** 0.5

    monkeypatch.setattr(scheduler, "set_timesteps", set_timesteps)
    check(scheduler, num_steps, monkeypatch, dtype=torch.float64)


OWN = {
    "ddim": (diffusers.DDIMScheduler, dict(clip_sample=False)),
    "ddpm": (diffusers.DDPMScheduler, dict(clip_sample=False)),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpmpp": (diffusers.DPMSolverMultistepScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, dict(beta_start=1e-4, beta_end=0.02)),
}


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("name", OWN)
def test_own_schedule(name, beta_schedule, monkeypatch):
    make, config = OWN[name]
    for num_steps in STEPS:
        if name == "euler" and num_steps == 1:
            continue  # its one step starts at t = 0, whose noise level float32 has wrong by 8e-5
        scheduler = make(**config, beta_schedule=beta_schedule)
        check(scheduler, num_steps, monkeypatch, own_schedule=True)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_lcm(num_steps, prediction, monkeypatch):
    scheduler = diffusers.LCMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, prediction_type=prediction
    )
    check(scheduler, num_steps, monkeypatch)


@pytest.mark.parametrize(
    ("num_steps", "times"), [(3, [999, 679, 359]), (4, [999, 759, 519, 279]), (1, [999])]
)
def test_lcm_official_rule(num_steps, times, monkeypatch):
    """The older rule, through diffusers' custom timesteps."""
    scheduler = diffusers.LCMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    plain = scheduler.set_timesteps
    monkeypatch.setattr(scheduler, "set_timesteps", lambda n: plain(timesteps=times))
    check(scheduler, num_steps, monkeypatch, timestep_rule="official")


@pytest.mark.parametrize(
    ("made", "config"),
    [
        (schedule.linear(), {}),
        (schedule.scaled_linear(), SD),
        (schedule.cosine(), dict(beta_schedule="squaredcos_cap_v2")),
    ],
)
def test_schedules(made, config):
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(made.alphas_cumprod, theirs, rtol=2e-5)
    again = schedule.from_config(schedule.to_config(made))
    np.testing.assert_array_equal(again.alphas_cumprod, made.alphas_cumprod)


def test_default_tables_are_diffusers_defaults():
    """The table made without options equals the one from diffusers' own default configuration."""
    pairs = [
        (solvers.ddim, diffusers.DDIMScheduler(clip_sample=False)),
        (solvers.ddpm, diffusers.DDPMScheduler(clip_sample=False)),
        (solvers.euler, diffusers.EulerDiscreteScheduler()),
        (solvers.dpmpp, diffusers.DPMSolverMultistepScheduler()),
        (solvers.deis, diffusers.DEISMultistepScheduler()),
    ]
    for solver, scheduler in pairs:
        plain = solver(schedule.linear(), 10)
        read = solvers.from_config(json.loads(scheduler.to_json_string()), 10)
        for ours, theirs in zip(jax.tree.leaves(plain), jax.tree.leaves(read), strict=True):
            np.testing.assert_array_equal(ours, theirs)


CLASSES = tuple(_CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_left_out_fields_are_the_defaults_of_their_class(name):
    theirs = getattr(diffusers, name)()
    ours = schedule.model_fields({"_class_name": name})
    assert ours == {field: theirs.config[field] for field in ours}
    made = schedule.from_config({"_class_name": name})
    np.testing.assert_allclose(made.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-5)


@pytest.mark.parametrize("stored", CLASSES)
@pytest.mark.parametrize("wanted", sorted(schedulers.NAMES))
def test_another_scheduler_keeps_the_noise_schedule_of_the_stored_one(stored, wanted):
    """The stored config says nothing but its class: the model was trained with its defaults."""
    ours = schedulers.override({"_class_name": stored}, wanted)
    theirs = getattr(diffusers, stored)()
    found = schedule.from_config(ours).alphas_cumprod
    np.testing.assert_allclose(found, theirs.alphas_cumprod.numpy(), rtol=1e-5)
    assert ours["prediction_type"] == theirs.config["prediction_type"]

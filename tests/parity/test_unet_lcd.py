"""One step of LCM's distillation of a UNet against an independent PyTorch computation.

Written from the algorithm (arXiv 2310.04378, algorithm 1) on diffusers' UNets with torch's own
autograd and schedule; the other side takes nothing from the library but weights, noise, index and
omega. Stochastic gradient descent: an update is a multiple of the gradient, so that it can be
compared entry by entry, which Adam's is not where a gradient is rounding error.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from cnxs_jax import tree as trees
from cnxs_jax.diffusion import sampling, schedule
from cnxs_jax.diffusion.expert_tree import Times
from cnxs_jax.models.unet import UNet
from tests.parity.helpers import convert, perturb
from tests.parity.test_unet import TINY, guidance_embedding
from train import objectives
from train.step import init_state, make_step

pytestmark = pytest.mark.parity
B, DECAY, RATE, RANGE, WIDTH = 4, 0.9, 0.05, (2.0, 14.0), 14
KEY = jax.random.key(7)
BETAS = (0.00085, 0.012)
WITHIN = 1e-4  # of the largest entry of what is compared


def torch_unet(seed, **own):
    torch.manual_seed(seed)
    return perturb(diffusers.UNet2DConditionModel(**TINY, **own), seed, 0.05)


def torch_step(student, average, teacher, x, noise, index, omega, text, null, prediction):
    """`(loss, {name: gradient})` of diffusers' modules; arrays are torch's, pictures NCHW."""
    betas = torch.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    t = (torch.arange(1, 51) * 20 - 1)[index]
    s = torch.clamp(t - 20, min=0)

    def wide(value):
        return value.float()[:, None, None, None]

    def alpha_sigma(time):
        return wide(abar[time].sqrt()), wide((1 - abar[time]).sqrt())

    def split(out, x_t, time):
        a, b = alpha_sigma(time)
        if prediction == "epsilon":
            return (x_t - b * out) / a, out
        return a * x_t - b * out, a * out + b * x_t

    def f(network, x_t, time):
        embedding = None
        if network.config.time_cond_proj_dim:
            embedding = guidance_embedding(omega.numpy(), WIDTH)
        out = network(x_t, time, text, timestep_cond=embedding).sample
        x0, _ = split(out, x_t, time)
        scaled = 10.0 * time.double()
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return wide(c_skip) * x_t + wide(c_out) * x0

    a, b = alpha_sigma(t)
    x_t = a * x + b * noise
    with torch.no_grad():
        (x0_c, e_c), (x0_u, e_u) = (split(teacher(x_t, t, c).sample, x_t, t) for c in (text, null))
        a, b = alpha_sigma(s)
        x_s = a * (x0_c + wide(omega) * (x0_c - x0_u)) + b * (e_c + wide(omega) * (e_c - e_u))
        target = f(average, x_s, s)
    d = f(student, x_t, t) - target
    loss = (torch.sqrt(d**2 + 1e-6) - 1e-3).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize(
    ("embedded", "prediction"),
    [(True, "epsilon"), pytest.param(False, "v_prediction", marks=pytest.mark.slow)],
)
def test_one_step_equals_pytorch(embedded, prediction):
    own = {"time_cond_proj_dim": WIDTH} if embedded else {}
    models = [torch_unet(1, **own), torch_unet(2, **own), torch_unet(3)]
    student, average, teacher = (convert(model.state_dict()) for model in models)
    rng = np.random.default_rng(0)
    x = (0.5 * rng.standard_normal((B, 8, 8, 4))).astype(np.float32)
    text, null = (rng.standard_normal((B, 5, 12)).astype(np.float32) for _ in range(2))

    tx = optax.sgd(RATE)
    state = init_state(student, tx)._replace(ema=average)
    guided = {"omega_range": RANGE} if embedded else {"omega": 4.5}
    objective = objectives.consistency(
        sampling.denoiser(UNet(**TINY, **own)), sampling.denoiser(UNet(**TINY)),
        schedule.scaled_linear(*BETAS), prediction=prediction, **guided,
    )  # fmt: skip
    batch = {"x": x, "cond": {"text": text, "null": {"text": null}}}
    keys = jax.random.split(jax.random.fold_in(KEY, 0), B)
    index, noise = objectives.draw(keys, jnp.asarray(x), Times(50).draw)
    omega = objectives.draw_omega(keys, B, RANGE) if embedded else jnp.full((B,), 4.5)
    with jax.default_matmul_precision("highest"):
        after, metrics = jax.jit(make_step(objective, tx, DECAY))(
            state, {"teacher": teacher}, batch, KEY
        )

    images = [torch.tensor(np.asarray(v)).permute(0, 3, 1, 2) for v in (x, noise)]
    rest = [torch.tensor(np.asarray(v)) for v in (omega, text, null)]
    loss, grads = torch_step(*models, *images, torch.tensor(np.asarray(index)).long(), *rest,
                             prediction)  # fmt: skip
    assert float(metrics["loss"]) == pytest.approx(loss, rel=WITHIN)
    expected = trees.flatten(convert(grads))
    before, found = trees.flatten(student), trees.flatten(after.params)
    means, theirs = trees.flatten(after.ema), trees.flatten(average)
    largest = max(np.abs(g).max() for g in expected.values())
    errors = {}
    for name, g in expected.items():
        moved = np.asarray(found[name], np.float64) - before[name]
        errors[name] = np.abs(moved + RATE * g).max() / (RATE * largest)
        mean = DECAY * theirs[name] + (1 - DECAY) * (before[name] - RATE * g)
        np.testing.assert_allclose(means[name], mean, atol=1e-6)
    print(f"loss {loss:.4f}, {len(errors)} updates within {max(errors.values()):.1e}")
    assert found.keys() == errors.keys()
    assert max(errors.values()) <= WITHIN
    if embedded:
        assert np.abs(expected["time_embedding/cond_proj/kernel"]).max() > 1e-3 * largest

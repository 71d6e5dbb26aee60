"""One step of latent consistency distillation against an independent PyTorch computation.

Written from PixArt-delta's algorithm 1 (arXiv 2401.05252) with torch's own autograd, schedule and
AdamW; nothing of the library is used on that side but the numbers of weights, noise and index.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from cnxs_jax.diffusion import schedule
from cnxs_jax.diffusion.expert_tree import Times
from train import objectives
from train.step import init_state, make_step

pytestmark = pytest.mark.parity
B, SIDE, C, WIDTH, OMEGA, DECAY, RATE = 6, 4, 3, 32, 4.5, 0.95, 1e-3
KEY = jax.random.key(7)


def weights(seed):
    rng = np.random.default_rng(seed)
    inputs = SIDE * SIDE * C + 2 + 5
    return {
        "w1": rng.standard_normal((inputs, WIDTH)) / np.sqrt(inputs),
        "b1": rng.standard_normal(WIDTH) * 0.1,
        "w2": rng.standard_normal((WIDTH, SIDE * SIDE * 2 * C)) / np.sqrt(WIDTH),
        "b2": rng.standard_normal(SIDE * SIDE * 2 * C) * 0.1,
    }


def network(params, x, t, cond):
    """Twice the channels, as with PixArt's learned variance."""
    t = t[:, None].astype(jnp.float32) / 1000.0
    h = jnp.concatenate([x.reshape(len(x), -1), jnp.sin(t), jnp.cos(t), cond["text"]], axis=1)
    h = jnp.tanh(h @ params["w1"] + params["b1"][None])
    return (h @ params["w2"] + params["b2"][None]).reshape(len(x), SIDE, SIDE, 2 * C)


def torch_network(params, x, t, text):
    t = t[:, None].float() / 1000.0
    h = torch.cat([x.flatten(1), torch.sin(t), torch.cos(t), text], dim=1)
    h = torch.tanh(h @ params["w1"] + params["b1"])
    out = (h @ params["w2"] + params["b2"]).reshape(len(x), SIDE, SIDE, 2 * C)
    return out[..., :C]


def torch_step(student, ema, teacher, x, noise, index, text, null, prediction, loss_name):
    """`(loss, gradient norm, student after AdamW, EMA after it)`."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    grid = torch.arange(1, 51) * 20 - 1
    t = grid[index]
    s = torch.clamp(t - 20, min=0)

    def split(out, x_t, time):
        a = abar[time].sqrt().float()[:, None, None, None]
        b = (1 - abar[time]).sqrt().float()[:, None, None, None]
        if prediction == "epsilon":
            return (x_t - b * out) / a, out
        return a * x_t - b * out, a * out + b * x_t

    def f(params, x_t, time):
        x0, _ = split(torch_network(params, x_t, time, text), x_t, time)
        scaled = 10.0 * time.double()
        c_skip = (0.25 / (scaled**2 + 0.25)).float()[:, None, None, None]
        c_out = (scaled / (scaled**2 + 0.25).sqrt()).float()[:, None, None, None]
        return c_skip * x_t + c_out * x0

    a_t = abar[t].sqrt().float()[:, None, None, None]
    b_t = (1 - abar[t]).sqrt().float()[:, None, None, None]
    x_t = a_t * x + b_t * noise
    with torch.no_grad():
        x0_c, e_c = split(torch_network(teacher, x_t, t, text), x_t, t)
        x0_u, e_u = split(torch_network(teacher, x_t, t, null), x_t, t)
        x0 = x0_c + OMEGA * (x0_c - x0_u)
        eps = e_c + OMEGA * (e_c - e_u)
        a_s = abar[s].sqrt().float()[:, None, None, None]
        b_s = (1 - abar[s]).sqrt().float()[:, None, None, None]
        target = f(ema, a_s * x0 + b_s * eps, s)
    student = {k: v.clone().requires_grad_() for k, v in student.items()}
    d = f(student, x_t, t) - target
    loss = (torch.sqrt(d**2 + 1e-6) - 1e-3).mean() if loss_name == "pseudo_huber" else (d**2).mean()
    optimiser = torch.optim.AdamW(student.values(), lr=RATE, weight_decay=0.0, eps=1e-8)
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in student.values()))
    optimiser.step()
    averaged = {k: DECAY * ema[k] + (1 - DECAY) * v.detach() for k, v in student.items()}
    return loss.item(), norm.item(), {k: v.detach() for k, v in student.items()}, averaged


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("loss", ["pseudo_huber", "l2"])
def test_one_step_equals_pytorch(prediction, loss):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((B, SIDE, SIDE, C)) * 0.5).astype(np.float32)
    text, null = (rng.standard_normal((B, 5)).astype(np.float32) for _ in range(2))
    trees = [
        {k: jnp.asarray(v, jnp.float32) for k, v in weights(seed).items()} for seed in (1, 2, 3)
    ]
    student, ema, teacher = trees

    tx = optax.adamw(RATE, weight_decay=0.0, eps=1e-8)
    state = init_state(student, tx)._replace(ema=ema)
    objective = objectives.consistency(
        network, network, schedule.linear(), prediction=prediction, omega=OMEGA, loss=loss
    )
    step = jax.jit(make_step(objective, tx, DECAY))
    batch = {"x": x, "cond": {"text": text, "null": {"text": null}}}
    keys = jax.random.split(jax.random.fold_in(KEY, 0), B)
    index, noise = objectives.draw(keys, jnp.asarray(x), Times(50).draw)
    with jax.default_matmul_precision("highest"):
        state, metrics = step(state, {"teacher": teacher}, batch, KEY)

    def to_torch(tree):
        return {k: torch.tensor(np.asarray(v)) for k, v in tree.items()}

    arrays = [torch.tensor(np.asarray(v)) for v in (x, noise, index, text, null)]
    arrays[2] = arrays[2].long()
    got = torch_step(*map(to_torch, trees), *arrays, prediction, loss)
    assert float(metrics["loss"]) == pytest.approx(got[0], rel=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(got[1], rel=1e-4)
    for mine, theirs in ((state.params, got[2]), (state.ema, got[3])):
        for name in mine:
            np.testing.assert_allclose(mine[name], theirs[name].numpy(), atol=1e-5)
    assert max(float(jnp.abs(state.ema[k] - ema[k]).max()) for k in ema) > 1e-2

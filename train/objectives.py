"""What to minimise: `denoise`, `consistency` (LCD) and `autoencode`.

An objective is `objective(params, ema, frozen, batch, keys) -> (loss, metrics)` with
`batch = {"x": [B,H,W,C], "cond": {...}}` and `keys` one key, or one an example. Which parameters
it moves is `resolve(params, frozen)`'s business; which network, `denoise_fn`'s.

Everything here is float32: half precision lives inside the networks.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax import lora
from cnxs_jax import tree as trees
from cnxs_jax.diffusion import consistency as lcd
from cnxs_jax.diffusion import prediction as predictions
from cnxs_jax.diffusion import schedule as schedules
from cnxs_jax.diffusion.expert_tree import Times
from cnxs_jax.errors import ConfigError, did_you_mean
from train.step import example_keys

WEIGHTINGS = ("uniform", "min_snr")
LOSSES = ("pseudo_huber", "l2")


def identity(params, frozen):
    """`resolve` of a model that is trained whole."""
    return params


def with_frozen(params, frozen):
    """`resolve` of a model with frozen leaves, kept in `frozen["rest"]`."""
    return trees.merge(params, frozen["rest"])


def controlled(params, frozen):
    """`resolve` of a controller on a frozen base."""
    return {"base": frozen["base"], "control": params}


def with_lora(params, frozen):
    """`resolve` of an adapter tree on the frozen teacher (`cnxs_jax.lora`)."""
    return lora.merge(frozen["teacher"], params)


def _mean(x):
    """Mean over all axes but the first."""
    return x.reshape(x.shape[0], -1).mean(axis=1)


def draw(keys, x, draw_time):
    """`(draw_time(key) [B], normal noise like x)`, each example from its own key."""

    def one(key):
        key_t, key_noise = jax.random.split(key)
        return draw_time(key_t), jax.random.normal(key_noise, x.shape[1:])

    return jax.vmap(one)(example_keys(keys, x.shape[0]))


def draw_omega(keys, batch_size, limits):
    """Uniform omega [B] within `limits`, each from its example's key, apart from `draw`'s."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 2))(example_keys(keys, batch_size))
    low, high = limits
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, low, high))(keys)


def repeated(tree, keys, times):
    """Every example of a batch `times` over, each with its own key."""
    if times == 1:
        return tree, keys
    batch_size = jax.tree.leaves(tree)[0].shape[0]
    keys = jax.vmap(lambda k: jax.random.split(k, times))(example_keys(keys, batch_size))
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree), keys.reshape(-1)


def _check(value, choices, where):
    if value not in choices:
        raise ConfigError(
            f"unknown {where} {value!r}.{did_you_mean(value, choices)}",
            where,
            f"use one of {', '.join(choices)}",
        )


def _times_of(low, high, logit_normal):
    """`key -> time` in [low, high)."""
    times = Times(high - low, logit_normal)
    return lambda key: low + times.draw(key)


def denoise(
    denoise_fn,
    schedule,
    resolve=identity,
    prediction="epsilon",
    loss_weighting="uniform",
    snr_gamma=5.0,
    learned_range=False,
    t_range=None,
    logit_normal=None,
    noises=1,
    draw_time=None,
    terms=None,
):
    """Denoising: E ||target - denoise_fn(x_t)||^2 (Ho et al. 2020, eq. 14).

    Args:
        denoise_fn: `(params, x_t, t, cond) -> out`; its first C channels are the prediction.
        schedule: a discrete `NoiseSchedule`.
        resolve: `(params, frozen) -> params of denoise_fn`.
        prediction: "epsilon", "v_prediction" or "sample".
        loss_weighting: "uniform", or "min_snr" with `snr_gamma` (Hang et al. 2023).
        learned_range: adds IDDPM's variational bound for the learned variance, the next C
            channels (Nichol and Dhariwal 2021, section 3.1); it does not move the mean.
        t_range: timesteps are drawn from [low, high); all of them unless given.
        logit_normal: (mean, sd) of their density over that range (`expert_tree.Times`); uniform
            unless given.
        noises: timesteps and noises drawn for each example, whose encoding they share.
        draw_time: `key -> time`, instead of `t_range` and `logit_normal`: an expert's truncated
            distribution, such as `lambda key: Times(1000, (0.0, 1.0)).draw(key, low, high)`.
        terms: weights by name of more losses [B]; `denoise_fn` gives `(out, losses)` then.

    Raises:
        ConfigError: an unknown name, or a range outside the schedule (JAX would clamp it).
    """
    steps = schedule.num_train_timesteps
    low, high = (0, steps) if t_range is None else t_range
    schedules.check_prediction(prediction)
    _check(loss_weighting, WEIGHTINGS, "loss_weighting")
    if not 0 <= low < high <= steps:
        raise ConfigError(f"t_range [{low}, {high}) is not inside [0, {steps})", "t_range")
    if draw_time is None:
        draw_time = _times_of(low, high, logit_normal)

    def objective(params, ema, frozen, batch, keys):
        batch, keys = repeated(batch, keys, noises)
        x, cond = batch["x"].astype(jnp.float32), batch["cond"]
        t, noise = draw(keys, x, draw_time)
        x_t = schedules.add_noise(schedule, x, noise, t)
        out = denoise_fn(resolve(params, frozen), x_t, t, cond)
        out, losses = out if terms else (out, {})
        target = predictions.target(schedule, x, noise, t, prediction)
        mse = _mean(jnp.square(predictions.mean_channels(out, x) - target))
        weight = 1.0
        if loss_weighting == "min_snr":
            weight = schedules.min_snr_weight(schedule, t, prediction, snr_gamma)
        loss, metrics = jnp.mean(weight * mse), {"mse": mse.mean()}
        if learned_range:
            eps = predictions.to_eps(schedule, x_t, out, t, prediction)
            variance = predictions.variance_channels(out, x)
            metrics["vb"] = variational_bound(schedule, x, x_t, t, eps, variance).mean()
            loss += metrics["vb"]
        for name, value in losses.items():
            metrics[name] = value.mean()
            loss += terms[name] * metrics[name]
        return loss, metrics

    return objective


def variational_bound(schedule, x, x_t, t, eps, raw_variance):
    """The bound L_t in bits a dimension [B], with the mean detached (IDDPM eq. 4-7 and 15).

    `raw_variance` in [-1, 1] interpolates between log beta-tilde_t and log beta_t.
    """
    beta, abar = schedule.betas, schedule.alphas_cumprod
    before = np.append(1.0, abar[:-1])
    posterior = beta * (1 - before) / (1 - abar)
    posterior[0] = posterior[1]  # the true one is 0, and only its logarithm is needed

    def at(table):
        return schedules.expand(jnp.asarray(table, jnp.float32)[t], x)

    x0 = predictions.to_x0(schedule, x_t, jax.lax.stop_gradient(eps), t, "epsilon")
    weight_x0 = at(beta * np.sqrt(before) / (1 - abar))
    # the two means share their x_t term: their difference is that of the x0 terms
    difference = weight_x0 * (x - x0)
    mean = weight_x0 * x0 + at((1 - before) * np.sqrt(1 - beta) / (1 - abar)) * x_t
    true_log_var = at(np.log(posterior))
    fraction = (raw_variance + 1) / 2
    log_var = fraction * at(np.log(beta)) + (1 - fraction) * true_log_var
    ratio = true_log_var - log_var
    kl = 0.5 * (jnp.exp(ratio) - 1 - ratio + jnp.square(difference) * jnp.exp(-log_var))
    first = -discretized_log_likelihood(x, mean, 0.5 * log_var)
    return jnp.where(t == 0, _mean(first), _mean(kl)) / math.log(2.0)


def discretized_log_likelihood(x, mean, log_scale):
    """Log-probability of the bin of width 2/255 around `x` under a Gaussian (DDPM eq. 13)."""
    inverse = jnp.exp(-log_scale)
    upper = jax.scipy.stats.norm.cdf((x - mean + 1 / 255) * inverse)
    lower = jax.scipy.stats.norm.cdf((x - mean - 1 / 255) * inverse)
    probability = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, 1e-12))


def consistency(
    student_fn,
    teacher_fn,
    schedule,
    resolve=identity,
    teacher=lambda frozen: frozen["teacher"],
    prediction="epsilon",
    omega=4.5,
    omega_range=None,
    num_ddim_steps=50,
    loss="pseudo_huber",
    huber_c=1e-3,
):
    """Latent consistency distillation as PixArt-delta does it (arXiv 2401.05252, algorithm 1), or
    with a guidance drawn for each example (LCM, arXiv 2310.04378, algorithm 1).

    Args:
        student_fn, teacher_fn: denoisers; the student may differ from the teacher (LoRA, guidance
            embedding). The teacher is guided here and must come without guidance.
        resolve: `(params, frozen) -> params of student_fn`, for the EMA too.
        teacher: `frozen -> params of teacher_fn`.
        omega: the fixed guidance, z + (1 + omega) Psi(c) - omega Psi(null); `cond["null"]` holds
            the unconditional keys.
        omega_range: (low, high) of a uniform omega an example instead. The student reads it as
            `cond["guidance"]` if it has a guidance embedding; without one it learns their mean.
        num_ddim_steps: N; the skip is k = T / N.
        loss: "pseudo_huber" (sqrt(d^2 + huber_c^2) - huber_c) or "l2".
    """
    schedules.check_prediction(prediction)
    _check(loss, LOSSES, "loss")
    grid = lcd.skip_grid(schedule, num_ddim_steps)

    def objective(params, ema, frozen, batch, keys):
        x, cond = batch["x"].astype(jnp.float32), batch["cond"]
        if "null" not in cond:
            raise ConfigError("distillation needs the unconditional keys", 'batch["cond"]["null"]')
        index, noise = draw(keys, x, Times(num_ddim_steps).draw)
        weight = omega
        if omega_range is not None:
            weight = draw_omega(keys, x.shape[0], omega_range)
            cond = {**cond, "guidance": weight}
        params_3 = (resolve(params, frozen), resolve(ema, frozen), teacher(frozen))
        predicted, target = lcd.lcd_pair(
            student_fn, teacher_fn, schedule, params_3, x, noise, index, cond, grid, weight,
            prediction,
        )  # fmt: skip
        mse = _mean(jnp.square(predicted - target))
        values = mse if loss == "l2" else lcd.pseudo_huber(predicted, target, huber_c)
        return values.mean(), {"mse": mse.mean()}

    return objective


def autoencode(encode_fn, decode_fn, resolve=identity, l2=0.5, kl=1e-4, edge=1.0):
    """An autoencoder: |x - x'| + l2 (x - x')^2 + edge |grad x - grad x'| + kl KL(q || N(0, 1)).

    Args:
        encode_fn: `(params, x [B,H,W,3]) -> (mean, logvar)`.
        decode_fn: `(params, z) -> x'`.
        l2, kl, edge: weights. `edge` compares the differences of neighbouring pixels: without it,
            and without the adversary that the published VAEs have, outlines come out soft.
    """

    def objective(params, ema, frozen, batch, keys):
        x, params = batch["x"].astype(jnp.float32), resolve(params, frozen)
        mean, logvar = encode_fn(params, x)
        _, noise = draw(keys, mean, Times(1).draw)
        error = decode_fn(params, mean + jnp.exp(0.5 * logvar) * noise).astype(jnp.float32) - x
        l1, mse = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
        edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2))
        divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        loss = l1 + l2 * mse + edge * edges + kl * divergence
        return loss, {"l1": l1, "mse": mse, "kl": divergence}

    return objective

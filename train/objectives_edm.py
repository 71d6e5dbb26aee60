"""The EDM objective of pixel-space denoisers and their experts (eDiff-I, arXiv 2211.01324).

Same form as `train.objectives`: `objective(params, ema, frozen, batch, keys) -> (loss, metrics)`.
"""

import jax
import jax.numpy as jnp

from cnxs_jax.diffusion import edm
from cnxs_jax.diffusion.expert_tree import WHOLE, LogNormal
from cnxs_jax.diffusion.prediction import mean_channels
from cnxs_jax.errors import ConfigError
from train.objectives import identity, repeated
from train.step import example_keys

# encoder -> the masks that switch it off; `pooled` follows `clip_text_mask` inside the network
ENCODER_MASKS = {
    "text": "text_mask",
    "clip_text": "clip_text_mask",
    "clip_image": "clip_image_mask",
}


def edm_denoise(
    network,
    levels=None,
    resolve=identity,
    interval=(WHOLE.low, WHOLE.high),
    sigma_data=edm.SIGMA_DATA,
    max_low_res_noise=None,
    dropout=None,
    noises=1,
):
    """Denoising in EDM form: E weight(sigma) |D(x; sigma) - x0|^2 (arXiv 2206.00364, eq. 8).

    Computed as the equal `|F - target|^2` of the raw network, see `edm.network_target`.

    Args:
        network: the raw F, `(params, c_in x, c_noise, cond) -> out`; `cond["sigma"]` is written.
        levels: the training noise distribution, `LogNormal()` unless given.
        interval: quantiles (low, high) of `levels` that an expert trains on; None reads them from
            `frozen["interval"]` [2], for experts that train side by side.
        max_low_res_noise: super-resolution: `low_res` gets noise of a level drawn uniformly from
            [0, this]; left as it is unless given.
        dropout: encoder ("text", "clip_text", "clip_image") -> share of the examples in which it
            is masked, each independently; needs the encoder's mask in `cond`.
        noises: noise levels and noises drawn for each example.

    Raises:
        ConfigError: an unknown encoder or a rate outside [0, 1].
    """
    levels = LogNormal() if levels is None else levels
    check_rates(dropout or {})

    def objective(params, ema, frozen, batch, keys):
        batch, keys = repeated(batch, keys, noises)
        low, high = frozen["interval"] if interval is None else interval
        x, cond = batch["x"].astype(jnp.float32), batch["cond"]
        key_sigma, key_noise, key_drop, key_low_res = _split(example_keys(keys, x.shape[0]), 4)
        sigma = jax.vmap(lambda k: levels.draw(k, low, high))(key_sigma)
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(key_noise)
        if dropout:
            cond = drop_encoders(cond, dropout, key_drop)
        if max_low_res_noise is not None:
            cond = noised_low_res(cond, max_low_res_noise, key_low_res)
        scaled, c_noise = edm.network_input(x, noise, sigma, sigma_data)
        out = network(resolve(params, frozen), scaled, c_noise, {**cond, "sigma": sigma})
        error = mean_channels(out, x) - edm.network_target(x, noise, sigma, sigma_data)
        loss_B = jnp.square(error).reshape(x.shape[0], -1).mean(axis=1)
        mse = jnp.mean(loss_B / edm.loss_weight(sigma, sigma_data))
        return loss_B.mean(), {"mse": mse, "log_sigma": jnp.log(sigma).mean()}

    return objective


def drop_encoders(cond, rates, keys):
    """`cond` in which each encoder is masked for an independent share of the examples.

    Args:
        rates: encoder -> share in [0, 1].
        keys: `[B]`, one an example.
    """
    dropped = {}
    for key_column, (encoder, rate) in zip(
        _split(keys, len(rates)), sorted(rates.items()), strict=True
    ):
        name = ENCODER_MASKS[encoder]
        if name not in cond:
            raise ConfigError(f"dropping {encoder} needs its mask", f'batch["cond"]["{name}"]')
        keep = jax.vmap(lambda k, rate=rate: jax.random.bernoulli(k, 1.0 - rate))(key_column)
        mask = cond[name]
        dropped[name] = mask * keep.reshape((-1,) + (1,) * (mask.ndim - 1)).astype(mask.dtype)
    return {**cond, **dropped}


def noised_low_res(cond, most, keys):
    """`cond` with noise of a uniform level in [0, most] an example in its `low_res`."""
    if "low_res" not in cond:
        raise ConfigError("noise augmentation needs a picture", 'batch["cond"]["low_res"]')
    key_level, key_noise = _split(keys, 2)
    level = jax.vmap(lambda k: jax.random.uniform(k, maxval=most))(key_level)
    shape = cond["low_res"].shape[1:]
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(key_noise)
    return edm.augment_low_res(cond, level, noise)


def check_rates(rates):
    """Raises ConfigError unless `rates` maps known encoders to shares in [0, 1]."""
    for encoder, rate in rates.items():
        if encoder not in ENCODER_MASKS or not 0 <= rate <= 1:
            raise ConfigError(
                f"dropout {encoder!r}: {rate} is not an encoder with a share in [0, 1]",
                "dropout",
                f"use some of {', '.join(ENCODER_MASKS)}",
            )


def _split(keys, parts):
    """`[B]` keys -> `parts` arrays of `[B]` keys."""
    split = jax.vmap(lambda k: jax.random.split(k, parts))(keys)
    return tuple(split[:, i] for i in range(parts))

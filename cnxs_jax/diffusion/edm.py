"""EDM's form of a denoiser (Karras et al. 2022, arXiv 2206.00364, table 1), as eDiff-I trains it.

`x = x0 + sigma * noise`. The network F sees unit-variance input and predicts a unit-variance
target; `D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)` is the predicted x0.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cnxs_jax.diffusion.prediction import mean_channels
from cnxs_jax.diffusion.sampling import prepare
from cnxs_jax.diffusion.schedule import expand

SIGMA_DATA = 0.5


class Scalings(NamedTuple):
    """`c_skip, c_out, c_in, c_noise`, float32 of sigma's shape."""

    skip: Any
    out: Any
    input: Any
    noise: Any


def scalings(sigma, sigma_data=SIGMA_DATA):
    """The four scalings at noise levels `sigma` > 0; `c_noise = ln(sigma) / 4`."""
    sigma = jnp.asarray(sigma, jnp.float32)
    total = jnp.square(sigma) + sigma_data**2
    root = jnp.sqrt(total)
    return Scalings(
        sigma_data**2 / total, sigma * sigma_data / root, 1.0 / root, jnp.log(sigma) / 4.0
    )


def loss_weight(sigma, sigma_data=SIGMA_DATA):
    """`1 / c_out^2`, the weight of `|D - x0|^2` that makes every level's error of F count alike."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return (jnp.square(sigma) + sigma_data**2) / jnp.square(sigma * sigma_data)


def network_target(x0, noise, sigma, sigma_data=SIGMA_DATA):
    """What F should output, float32: `(sigma x0 / sigma_data - sigma_data noise) / root`.

    `|F - target|^2` equals the weighted `|D - x0|^2` without its cancellation at small sigma.
    """
    x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
    sigma = expand(jnp.asarray(sigma, jnp.float32), x0)
    return (sigma / sigma_data * x0 - sigma_data * noise) * jax.lax.rsqrt(
        jnp.square(sigma) + sigma_data**2
    )


def network_input(x0, noise, sigma, sigma_data=SIGMA_DATA):
    """`(c_in x, c_noise)` for `x = x0 + sigma noise`."""
    c = scalings(sigma, sigma_data)
    x = x0.astype(jnp.float32) + expand(jnp.asarray(sigma, jnp.float32), x0) * noise
    return expand(c.input, x) * x, c.noise


@dataclass(frozen=True)
class Preconditioned:
    """A raw network F as a denoiser whose time is the noise level and whose output is x0."""

    network: Any
    sigma_data: float = SIGMA_DATA

    def __call__(self, params, x, t, cond):
        """Predicted x0, float32 `[B, H, W, C]`, at noise levels `t [B]`."""
        c = scalings(t, self.sigma_data)
        x = x.astype(jnp.float32)
        out = self.network(params, expand(c.input, x) * x, c.noise, {"sigma": t, **cond})
        return expand(c.skip, x) * x + expand(c.out, x) * mean_channels(out, x)

    def prepare(self, params, cond):
        """The network's own preparation."""
        return prepare(self.network, params, cond)


def precondition(network, sigma_data=SIGMA_DATA):
    """`network` in EDM form; see `Preconditioned`."""
    return Preconditioned(network, sigma_data)


def augment_low_res(cond, level, noise):
    """`cond` with noise of `level [B]` in its `low_res`, and the level that the network reads.

    Noise augmentation of a cascade (Ho et al. 2022, arXiv 2106.15282, section 4.2): the picture
    and its level are replaced together, so that both reach the network.
    """
    level = jnp.asarray(level, jnp.float32)
    noised = cond["low_res"].astype(jnp.float32) + expand(level, noise) * noise
    return {**cond, "low_res": noised, "low_res_noise": level}

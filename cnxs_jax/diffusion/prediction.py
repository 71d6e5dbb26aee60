"""What the network's output means, and the consistency model's boundary scalings.

A network predicts the noise (`epsilon`), the velocity `v = alpha noise - sigma x0` (Salimans and
Ho 2022) or the clean `sample`. All functions take `x [B, ..., C]`, `out [B, ..., >= C]`, `t [B]`
and compute in float32. A network with a learned variance range (PixArt) has 2C channels; the first
C are the prediction.
"""

import jax.numpy as jnp
import numpy as np

from cnxs_jax.diffusion.schedule import check_prediction, expand


def mean_channels(out, x):
    """The first `x.shape[-1]` channels of `out`, in float32."""
    return out[..., : x.shape[-1]].astype(jnp.float32)


def variance_channels(out, x):
    """The channels of `out` behind the prediction, or None where there are none."""
    return out[..., x.shape[-1] :].astype(jnp.float32) if out.shape[-1] > x.shape[-1] else None


def to_x0(schedule, x, out, t, prediction="epsilon"):
    """Predicted clean sample, float32 of x's shape."""
    check_prediction(prediction)
    x, out, alpha, sigma = _terms(schedule, x, out, t)
    if prediction == "sample":
        return out
    if prediction == "v_prediction":
        return alpha * x - sigma * out
    return (x - sigma * out) / alpha


def to_eps(schedule, x, out, t, prediction="epsilon"):
    """Predicted noise, float32 of x's shape."""
    check_prediction(prediction)
    x, out, alpha, sigma = _terms(schedule, x, out, t)
    if prediction == "epsilon":
        return out
    if prediction == "v_prediction":
        return alpha * out + sigma * x
    return (x - alpha * out) / sigma


def target(schedule, x0, noise, t, prediction="epsilon"):
    """What the network should output for `add_noise(schedule, x0, noise, t)`, float32."""
    check_prediction(prediction)
    x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
    if prediction == "sample":
        return x0
    if prediction == "epsilon":
        return noise
    return expand(schedule.alpha(t), x0) * noise - expand(schedule.sigma(t), x0) * x0


def boundary_scalings(t, sigma_data=0.5, timestep_scaling=10.0):
    """`(c_skip, c_out)` of `f(x, t) = c_skip x + c_out x0`, float32 of t's shape.

    Exactly (1, 0) at t = 0 (consistency models, arXiv 2303.01469, eq. 5, in LCM's form). In half
    precision `(10 t)^2` overflows from t = 26 on and f would be zero, so t is widened first.
    """
    return _scalings(jnp.asarray(t).astype(jnp.float32) * timestep_scaling, sigma_data)


def boundary_scalings_f64(t, sigma_data=0.5, timestep_scaling=10.0):
    """`boundary_scalings` on the host in float64, for solver tables."""
    return _scalings(np.asarray(t, np.float64) * timestep_scaling, sigma_data)


def apply_boundary(x, x0, t, sigma_data=0.5, timestep_scaling=10.0):
    """`f(x, t) = c_skip(t) x + c_out(t) x0` in float32; `f(x, 0) == x` to the bit."""
    c_skip, c_out = (expand(c, x) for c in boundary_scalings(t, sigma_data, timestep_scaling))
    return c_skip * x.astype(jnp.float32) + c_out * x0.astype(jnp.float32)


def _scalings(scaled, sigma_data):
    total = scaled**2 + sigma_data**2
    return sigma_data**2 / total, scaled / total**0.5


def _terms(schedule, x, out, t):
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    return x.astype(jnp.float32), mean_channels(out, x), alpha, sigma

"""Noise schedules: how much signal and how much noise `x` holds at time `t`.

`x_t = alpha(t) * x0 + sigma(t) * noise`. Two kinds exist. `discrete` is variance preserving, with
integer times and `alpha = sqrt(abar)`, `sigma = sqrt(1 - abar)` (DDPM, Stable Diffusion, PixArt).
`edm` is variance exploding, with `alpha = 1` and the noise level itself as time (Karras et al.
2022, arXiv 2206.00364).

Everything is computed in float64 on the host and rounded to float32 once: a running product in
bfloat16 gives abar == 1 at the first ten steps of PixArt's schedule, hence an infinite SNR.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cnxs_jax.errors import ConfigError, did_you_mean

PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A noise schedule. Make one with `linear`, `scaled_linear`, `cosine`, `from_betas` or `edm`.

    Attributes:
        kind: "discrete" or "edm".
        betas, alphas_cumprod: float64 `[num_train_timesteps]` (empty for edm).
        name: diffusers' `beta_schedule` ("trained_betas" where the betas were given, "edm").
        beta_start, beta_end: as in diffusers' config; None where they do not apply.
        sigma_min, sigma_max, rho: the range and curvature of the edm grid; None for discrete.
    """

    kind: str
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    name: str
    beta_start: float | None = None
    beta_end: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None

    @property
    def num_train_timesteps(self):
        """Number of training times; 0 for edm, whose time is continuous."""
        return len(self.alphas_cumprod)

    @property
    def noise_levels(self):
        """`sigma / alpha` at each training time, float64 `[num_train_timesteps]`."""
        return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)

    def alpha(self, t):
        """Signal coefficient at `t`, float32 of t's shape. See `check_timesteps` for errors."""
        if self.kind == "edm":
            return jnp.ones(jnp.shape(t), jnp.float32)
        return self._gather(np.sqrt(self.alphas_cumprod), t)

    def sigma(self, t):
        """Noise coefficient at `t`, float32 of t's shape. See `check_timesteps` for errors."""
        if self.kind == "edm":
            return jnp.asarray(check_timesteps(self, t), jnp.float32)
        return self._gather(np.sqrt(1.0 - self.alphas_cumprod), t)

    def snr(self, t):
        """Signal-to-noise ratio `(alpha / sigma)^2` at `t`, float32 of t's shape."""
        if self.kind == "edm":
            return self.sigma(t) ** -2
        return self._gather(self.alphas_cumprod / (1.0 - self.alphas_cumprod), t)

    def _gather(self, values, t):
        t = check_timesteps(self, t)
        return jnp.asarray(values, jnp.float32)[jnp.asarray(t).astype(jnp.int32)]


def linear(beta_start=1e-4, beta_end=0.02, num_steps=1000):
    """Betas equally spaced (DDPM, DiT, PixArt)."""
    _check_betas(beta_start, beta_end, num_steps)
    betas = np.linspace(beta_start, beta_end, num_steps, dtype=np.float64)
    return _discrete(betas, "linear", beta_start, beta_end)


def scaled_linear(beta_start=0.00085, beta_end=0.012, num_steps=1000):
    """Square roots of the betas equally spaced (Stable Diffusion, the LCM scheduler's default)."""
    _check_betas(beta_start, beta_end, num_steps)
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=np.float64) ** 2
    return _discrete(betas, "scaled_linear", beta_start, beta_end)


def cosine(num_steps=1000, max_beta=0.999):
    """Nichol and Dhariwal 2021, eq. 17; diffusers' "squaredcos_cap_v2"."""
    abar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return _discrete(np.minimum(1.0 - abar[1:] / abar[:-1], max_beta), "squaredcos_cap_v2")


def from_betas(betas):
    """A discrete schedule from given betas `[num_train_timesteps]`, each in (0, 1)."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not len(betas) or not np.all((betas > 0) & (betas < 1)):
        raise ConfigError("betas must be a list of numbers in (0, 1)", "trained_betas")
    return _discrete(betas, "trained_betas")


def from_alphas_cumprod(abar):
    """A discrete schedule from given abar `[num_train_timesteps]`, falling, in (0, 1).

    For replaying another library's rounding: PyTorch libraries keep abar in float32, where
    `1 - abar` at the first times is only known to 1e-4.
    """
    abar = np.asarray(abar, np.float64)
    if abar.ndim != 1 or not np.all((abar > 0) & (abar < 1)) or np.any(np.diff(abar) >= 0):
        raise ConfigError("abar must be falling numbers in (0, 1)", "alphas_cumprod")
    betas = 1.0 - abar / np.append(1.0, abar[:-1])
    return NoiseSchedule("discrete", betas, abar, "trained_betas")


def edm(sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Variance exploding, `x = x0 + sigma * noise`, time = noise level (Karras et al. 2022)."""
    if not 0 < sigma_min < sigma_max or not rho > 0:
        raise ConfigError(
            f"need 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max}, {rho}",
            "schedule.edm",
        )
    none = np.zeros(0)
    return NoiseSchedule("edm", none, none, "edm", None, None, sigma_min, sigma_max, rho)


def model_fields(config):
    """The fields of a diffusers scheduler config that belong to the model and not to the solver.

    What the config leaves out is written out with the default of its own class, so that another
    class may read it: 1000 steps, linear from 1e-4 to 0.02, epsilon; `LCMScheduler` has scaled
    linear from 0.00085 to 0.012.
    """
    lcm = config.get("_class_name") == "LCMScheduler"
    defaults = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085 if lcm else 1e-4,
        "beta_end": 0.012 if lcm else 0.02,
        "beta_schedule": "scaled_linear" if lcm else "linear",
        "prediction_type": "epsilon",
    }
    fields = {name: config.get(name, default) for name, default in defaults.items()}
    kept = ("trained_betas", "steps_offset", "set_alpha_to_one")
    return fields | {name: config[name] for name in kept if config.get(name) is not None}


def from_config(config):
    """The schedule that a diffusers `scheduler_config.json` (a dict) describes.

    Missing fields take the defaults of the config's class in diffusers (`model_fields`).

    Raises:
        ConfigError: an unknown `beta_schedule`, or zero-terminal-SNR rescaling.
    """
    if config.get("rescale_betas_zero_snr"):
        raise ConfigError("zero terminal SNR is not supported", "rescale_betas_zero_snr")
    fields = model_fields(config)
    if "trained_betas" in fields:
        return from_betas(fields["trained_betas"])
    name, num_steps = fields["beta_schedule"], fields["num_train_timesteps"]
    if name == "squaredcos_cap_v2":
        return cosine(num_steps)
    makers = {"linear": linear, "scaled_linear": scaled_linear}
    if name not in makers:
        known = [*makers, "squaredcos_cap_v2"]
        raise ConfigError(
            f"unknown beta_schedule {name!r}.{did_you_mean(name, known)}",
            "scheduler_config.json",
            f"use one of {', '.join(known)}",
        )
    return makers[name](fields["beta_start"], fields["beta_end"], num_steps)


def to_config(schedule):
    """The `scheduler_config.json` fields of a discrete schedule; `from_config` reads them back."""
    if schedule.kind != "discrete":
        raise ConfigError("an edm schedule has no diffusers fields", "schedule.to_config")
    config = {"num_train_timesteps": schedule.num_train_timesteps}
    if schedule.name == "trained_betas":
        return config | {"trained_betas": schedule.betas.tolist()}
    config["beta_schedule"] = schedule.name
    if schedule.beta_start is not None:
        config |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    return config


def check_timesteps(schedule, t):
    """Returns `t`, after a range check where its values are known (not while tracing).

    JAX clamps an index that is out of range, which would train on the wrong noise in silence.

    Raises:
        ConfigError: a time outside [0, num_train_timesteps) or, for edm, a negative level.
    """
    if isinstance(t, jax.core.Tracer):
        return t
    values = np.asarray(t)
    high = np.inf if schedule.kind == "edm" else schedule.num_train_timesteps
    if values.size and not (np.all(values >= 0) and np.all(values < high)):
        raise ConfigError(
            f"timesteps must be in [0, {high}), got {values.min()} to {values.max()}", "t"
        )
    return t


def add_noise(schedule, x0, noise, t):
    """`alpha(t) x0 + sigma(t) noise` in float32.

    Args:
        x0, noise: `[B, ...]`.
        t: `[B]`, integer times (discrete) or noise levels (edm).
    """
    alpha, sigma = (expand(c, x0) for c in (schedule.alpha(t), schedule.sigma(t)))
    return alpha * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def min_snr_weight(schedule, t, prediction="epsilon", gamma=5.0):
    """Min-SNR-gamma loss weight `[B]` (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    The paper's weight `min(snr, gamma)` belongs to x0 prediction; the other two follow from the
    Jacobian between the targets.
    """
    check_prediction(prediction)
    snr = schedule.snr(t)
    clipped = jnp.minimum(snr, gamma)
    return {"sample": clipped, "epsilon": clipped / snr, "v_prediction": clipped / (snr + 1.0)}[
        prediction
    ]


def expand(values_B, like):
    """`[B]` -> `[B, 1, ..., 1]` with the rank of `like`."""
    return jnp.reshape(values_B, jnp.shape(values_B) + (1,) * (jnp.ndim(like) - 1))


def check_prediction(prediction):
    """Raises ConfigError unless `prediction` is one of PREDICTIONS."""
    if prediction not in PREDICTIONS:
        raise ConfigError(
            f"unknown prediction type {prediction!r}.{did_you_mean(prediction, PREDICTIONS)}",
            "prediction",
            f"use one of {', '.join(PREDICTIONS)}",
        )


def _discrete(betas, name, beta_start=None, beta_end=None):
    abar = np.cumprod(1.0 - betas)
    return NoiseSchedule("discrete", betas, abar, name, beta_start, beta_end)


def _check_betas(beta_start, beta_end, num_steps):
    if not 0 < beta_start <= beta_end < 1:
        raise ConfigError(
            f"need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}", "schedule"
        )
    if not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ConfigError(f"the number of training steps must be >= 1, got {num_steps}", "schedule")

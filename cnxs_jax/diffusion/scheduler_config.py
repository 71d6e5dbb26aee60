"""A diffusers `scheduler_config.json` as a solver table.

Configuration files carry fields that belong to other schedulers (SDXL's Euler config holds DDIM's
and PNDM's); diffusers ignores what its class does not read, and so does this. A field that the
class does read but the tables cannot express is an error, never a silent difference, and so is a
field that no scheduler knows.
"""

from cnxs_jax.diffusion import schedule as schedules
from cnxs_jax.diffusion import solvers
from cnxs_jax.diffusion.plms import plms
from cnxs_jax.errors import ConfigError, did_you_mean

_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_SPACING = {"timestep_spacing": "timestep_rule", "steps_offset": "steps_offset"}
_PREDICTION = {"prediction_type": "prediction"}
_UNSUPPORTED = {"thresholding": False, "rescale_betas_zero_snr": False}
_NO_GRIDS = {
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
}
_FINAL_ALPHA = {True: "one", False: "first"}
_VARIANCE = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small"}
_VARIANCE |= {"fixed_large": "fixed_large"}

# Class name -> (solver, {field: option}, {field: the only values that a table expresses}).
# `clip_sample` is DDIM's and DDPM's default and is left out when unset: tables never clip.
_CLASSES = {
    "DDIMScheduler": (
        solvers.ddim,
        _SPACING | _PREDICTION | {"set_alpha_to_one": "final_alpha"},
        _UNSUPPORTED | {"clip_sample": False},
    ),
    "DDPMScheduler": (
        solvers.ddpm,
        _SPACING | _PREDICTION | {"variance_type": "variance"},
        _UNSUPPORTED | {"clip_sample": False},
    ),
    "EulerDiscreteScheduler": (
        solvers.euler,
        _SPACING
        | _PREDICTION
        | {"use_karras_sigmas": "karras", "final_sigmas_type": "final_sigma"},
        _UNSUPPORTED
        | _NO_GRIDS
        | {"interpolation_type": "linear", "timestep_type": "discrete"}
        | {"sigma_min": None, "sigma_max": None},
    ),
    "DPMSolverMultistepScheduler": (
        solvers.dpmpp,
        _SPACING
        | _PREDICTION
        | {"solver_order": "order", "lower_order_final": "lower_order_final"}
        | {"use_karras_sigmas": "karras", "use_lu_lambdas": "lambdas"}
        | {"final_sigmas_type": "final_sigma"},
        _UNSUPPORTED
        | _NO_GRIDS
        | {"algorithm_type": ("dpmsolver++", "deis")}
        | {"solver_type": ("midpoint", "logrho", "bh1", "bh2"), "euler_at_final": False}
        | {"lambda_min_clipped": float("-inf")},
    ),
    "DEISMultistepScheduler": (
        solvers.deis,
        _SPACING
        | _PREDICTION
        | {"solver_order": "order", "lower_order_final": "lower_order_final"}
        | {"use_karras_sigmas": "karras"},
        _UNSUPPORTED | _NO_GRIDS | {"algorithm_type": ("deis", "dpmsolver", "dpmsolver++")},
    ),
    "PNDMScheduler": (
        plms,
        _SPACING
        | _PREDICTION
        | {"set_alpha_to_one": "final_alpha", "skip_prk_steps": "skip_prk_steps"},
        _UNSUPPORTED,
    ),
    "LCMScheduler": (
        solvers.lcm,
        _PREDICTION
        | {"original_inference_steps": "original_steps", "timestep_scaling": "timestep_scaling"},
        _UNSUPPORTED | {"clip_sample": False},
    ),
}
_TRANSLATED = {"set_alpha_to_one": _FINAL_ALPHA, "variance_type": _VARIANCE}
# Read by some scheduler of diffusers, with no effect on a table.
_HARMLESS = (
    *("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio", "variance_type"),
    *("skip_prk_steps", "use_karras_sigmas", "solver_p", "predict_x0", "disable_corrector"),
    *("flow_shift", "time_shift_type", "predict_epsilon", "use_clipped_model_output", "shift"),
)


def from_config(config, num_steps, schedule=None, **options):
    """The table that a diffusers scheduler with this configuration would run.

    Args:
        config: the dict of a `scheduler_config.json`.
        num_steps: number of inference steps.
        schedule: a noise schedule to use instead of the configuration's.
        options: options of the solver that override the configuration, such as `eta`.

    Raises:
        ConfigError: an unknown class or field, a value that a table cannot express, or an
            impossible number of steps.
    """
    name = config.get("_class_name")
    if name not in _CLASSES:
        raise ConfigError(
            f"unsupported scheduler {name!r}.{did_you_mean(name, _CLASSES)}",
            "scheduler_config.json: _class_name",
            f"use one of {', '.join(_CLASSES)}",
        )
    solver, fields, fixed = _CLASSES[name]
    _check_fields(config, fixed)
    chosen = {}
    for field, option in fields.items():
        if config.get(field) is not None:
            chosen[option] = _translate(field, config[field])
    if schedule is None:
        schedule = schedules.from_config(config)
    return solver(schedule, num_steps, **(chosen | options))


def _translate(field, value):
    table = _TRANSLATED.get(field)
    if table is None:
        return value
    if value not in table:
        raise ConfigError(
            f"{field}={value!r} is not supported",
            "scheduler_config.json",
            f"use one of {', '.join(map(str, table))}",
        )
    return table[value]


def _check_fields(config, fixed):
    known = {*_SCHEDULE, *_HARMLESS}
    for _, fields, only in _CLASSES.values():
        known |= {*fields, *only}
    for field, value in config.items():
        if field.startswith("_"):
            continue
        if field not in known:
            raise ConfigError(
                f"unknown field {field!r}.{did_you_mean(field, known)}", "scheduler_config.json"
            )
        if field in fixed and value is not None and not _allowed(value, fixed[field]):
            raise ConfigError(
                f"{field}={value!r} is not supported, only {fixed[field]!r}",
                "scheduler_config.json",
                "clip or threshold with sample(post=...)" if "clip" in field else None,
            )


def _allowed(value, only):
    if isinstance(only, tuple):
        return value in only
    # diffusers writes -inf as a string.
    return value == only or str(value).lower() == str(only).lower()

"""The pipeline's scheduler: a diffusers config dict, stored with the model or chosen by name."""

import json
import pathlib

from cnxs_jax.errors import CheckpointError, ConfigError, did_you_mean

NAMES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "lcm": "LCMScheduler",
}
# What belongs to the model and not to the solver: kept when another solver is chosen.
_MODEL_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "steps_offset",
    "set_alpha_to_one",
)
# Written out because diffusers' defaults for them clip predictions, which no latent model wants.
_NO_CLIP = {"DDIMScheduler": {"clip_sample": False}, "DDPMScheduler": {"clip_sample": False}}


def read(directory):
    """The config dict of `directory`/scheduler/scheduler_config.json."""
    return read_json(pathlib.Path(directory) / "scheduler" / "scheduler_config.json")


def read_json(path):
    """A JSON object from a file; CheckpointError if it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("the file is missing", str(path)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not a readable JSON file: {error}", str(path)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object, got {type(value).__name__}", str(path))
    return value


def override(config, scheduler):
    """The config of another solver for the same model.

    Args:
        config: the stored config.
        scheduler: a name in `NAMES` (that solver with its defaults), or a dict with `_class_name`
            and any options. The model's noise schedule and prediction type stay unless the dict
            gives them.
    """
    if isinstance(scheduler, str):
        name = scheduler.lower()
        if name not in NAMES:
            raise ConfigError(
                f"unknown scheduler {scheduler!r}.{did_you_mean(name, NAMES)}",
                "scheduler",
                f"one of {', '.join(NAMES)}, or a diffusers scheduler config as a dict",
            )
        scheduler = {"_class_name": NAMES[name]}
    if not isinstance(scheduler, dict):
        raise ConfigError(f"expected a name or a dict, got {type(scheduler).__name__}", "scheduler")
    if "_class_name" not in scheduler:
        raise ConfigError(
            "the dict has no `_class_name`", "scheduler", f"such as {NAMES['ddim']!r}"
        )
    kept = {key: config[key] for key in _MODEL_KEYS if key in config}
    return {**kept, **_NO_CLIP.get(scheduler["_class_name"], {}), **scheduler}


def is_lcm(config):
    """Whether the model is sampled as a consistency model: few steps and no guidance."""
    return config["_class_name"] == NAMES["lcm"]

"""The recipes at a size that trains in seconds: a two-layer PixArt DiT, its T5 and a real VAE.

`get_config("denoise")` is the teacher's stage of `configs/pixart.py`, text encoder and DiT trained
together; `get_config("consistency")` is `configs/pixart_lcm.py` and needs a teacher (`teacher`).
"""

import dataclasses

import cnxs_jax
import configs.pixart
import configs.pixart_lcm
from tests.pipelines import tiny

STEPS = 20


def get_config(variant="denoise"):
    """A recipe of 20 steps."""
    config = denoise() if variant == "denoise" else consistency()
    config.matmul_precision = None
    config.steps, config.batch_size = STEPS, 16
    config.log_every, config.save_every, config.sample_every = 1, 5, 10_000
    return config


def denoise():
    config = configs.pixart.get_config("smoke").teacher
    config.vae_path = "{assets}/pixart_tiny/vae"
    return config


def consistency():
    config = configs.pixart_lcm.get_config("smoke")
    config.teacher_path = "{workdir}/../teacher"
    config.data.source, config.data.size, config.data.max_length = "shapes", tiny.SIDE, 8
    return config


def teacher(directory):
    """Writes a random pipeline of the same kind: what `consistency` distils.

    It predicts v, as the embedded teacher does: with noise prediction x0 is divided by alpha, 0.006
    at the last timestep, and so are the rounding errors by which meshes differ.
    """
    made = tiny.pipeline(directory / "tokens")
    made = dataclasses.replace(made, scheduler=made.scheduler | {"prediction_type": "v_prediction"})
    cnxs_jax.save_pipeline(made, directory / "teacher")
    return directory / "teacher"

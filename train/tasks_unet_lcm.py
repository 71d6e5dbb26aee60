"""Latent consistency distillation of Stable Diffusion's UNets (LCM, arXiv 2310.04378).

The student is one of three: a copy of the teacher with one omega built in; a copy that reads omega
through a guidance embedding (`guidance_embedding`), the only thing that it has beyond its teacher;
or an adapter on the teacher (`lora`, arXiv 2311.05556). What makes its text is the pipeline's, of
one encoder or two.
"""

import jax.numpy as jnp

from cnxs_jax import tree as trees
from cnxs_jax.convert import unet as layouts
from cnxs_jax.diffusion import sampling
from cnxs_jax.errors import ConfigError
from train import inputs, networks, networks_unet, objectives, validate
from train.loop import Task
from train.parts import (
    LORA,
    REMAT,
    SCHEDULE,
    latents,
    noise_schedule,
    outputs,
    scheduler_config,
    student_of,
    with_adapter_file,
)
from train.tasks import CONSISTENCY, check_distill
from train.tasks_unet import check_pictures, opened

KEYS = {
    "distill": {
        "data": inputs.KEYS,
        "teacher_path": validate.text,
        "dtype": validate.Optional(validate.choice("float32", "bfloat16")),
        "remat": validate.Optional(REMAT),
        "guidance_embedding": validate.Optional(validate.integer(2)),
        "guidance_scale": validate.Optional(validate.number(0)),
        "schedule": SCHEDULE,
        "objective": CONSISTENCY
        | {
            "omega": validate.Optional(validate.number(0)),
            "omega_range": validate.Optional(validate.numbers(2)),
        },
        "lora": validate.Optional(LORA),
    }
}
STEPS = 4  # of the pictures that a run draws
PROJECTION = "time_embedding/cond_proj/kernel"


def check_student(values, where):
    """Which students there are, and which omega each can learn."""
    check_distill(values, where)
    check_pictures(values["data"], f"{where}.data")
    objective, embedded = values["objective"], values.get("guidance_embedding")
    limits = objective.get("omega_range")
    if (objective.get("omega") is None) == (limits is None):
        what = "give omega (one for all) or omega_range (drawn for each picture), one of them"
        raise ConfigError(what, f"{where}.objective.omega")
    if limits is not None and not 0 <= limits[0] < limits[1]:
        what = f"{tuple(limits)} is no range of guidance"
        raise ConfigError(what, f"{where}.objective.omega_range", "write (low, high)")
    if embedded and limits is None:
        what = "an embedding of one omega learns nothing"
        raise ConfigError(what, f"{where}.guidance_embedding", "set objective.omega_range")
    if embedded and embedded % 2:
        what = f"{embedded} is odd, sines and cosines come in pairs"
        raise ConfigError(what, f"{where}.guidance_embedding", "give an even number, such as 256")
    if embedded and values.get("lora"):
        what = "an adapter has no guidance embedding"
        raise ConfigError(what, f"{where}.guidance_embedding", "give lora or guidance_embedding")


CONFLICTS = {"distill": check_student}


def distill(config):
    """Distils the pipeline at `teacher_path`; exports a pipeline with an LCMScheduler."""
    nets, tokenizers, loader, empty = opened(config, config.teacher_path)
    task, (student, resolve) = distillation(config, nets, empty)
    nets = nets.bare  # the functions below keep no second teacher

    def components(params, encoders):
        texts = zip(networks_unet.TEXTS, nets.texts, strict=False)
        found = {name: (text, encoders[name]) for name, (text, _) in texts}
        return {"unet": (student, params), "vae": (nets.vae, encoders["vae"]), **found}

    parts = config.objective.num_ddim_steps
    scheduler = scheduler_config(config, "LCMScheduler", original_inference_steps=parts)
    drawing = {"num_inference_steps": STEPS, "guidance_scale": config.get("guidance_scale")}
    family, given, entries = "StableDiffusionPipeline", tokenizers[0], {}
    if len(tokenizers) > 1:
        family, given = "StableDiffusionXLPipeline", tokenizers
        entries = {networks_unet.ZEROS: nets.zero_null}
    sample, export = outputs(
        config, components, given, scheduler, drawing, resolve, family, entries
    )
    if config.get("lora"):
        export = with_adapter_file(export, layouts.DIFFUSERS, "unet")
    return task._replace(loader=loader, sample=sample, export=export)


def distillation(config, nets, empty):
    """`(Task, (student, resolve))` of `distill`: the step alone (`train.networks.Recipe`)."""
    teacher, weights, encoders = nets.unet, nets.unet_params, nets.encoders
    student, start = with_embedding(teacher, weights, config.get("guidance_embedding"))
    trainable, frozen, resolve = student_of(config, weights, start)
    nets = nets.bare

    def encode(encoders, raw, key):
        """Latents, the captions' text, and what takes its place for the teacher's other half."""
        cond = networks_unet.guided_condition(nets, encoders, raw, empty)
        return {"x": latents(nets.vae, encoders["vae"], raw["image"], key), "cond": cond}

    objective = objectives.consistency(
        sampling.denoiser(student), sampling.denoiser(teacher), noise_schedule(config), resolve,
        **config.objective,
    )  # fmt: skip
    return Task(objective, trainable, None, encode, encoders, frozen), (student, resolve)


def with_embedding(teacher, params, width):
    """`(student, its parameters)`: the teacher with a guidance embedding of this width, if any.

    The embedding starts at zero: the student is its teacher, whatever omega says.

    Raises ConfigError for a teacher with such an embedding: it is guided already.
    """
    if teacher.time_cond_proj_dim:
        what = "the teacher reads its guidance as an input: it is distilled already"
        raise ConfigError(what, "config.teacher_path", "give the model that it was made from")
    if not width:
        return teacher, params
    zeros = jnp.zeros((width, teacher.block_out_channels[0]), jnp.float32)
    start = trees.unflatten({**trees.flatten(params), PROJECTION: zeros})
    return teacher.clone(time_cond_proj_dim=width), start


RECIPES = {
    "distill": networks.Recipe(
        "teacher_path", distillation, zeros=networks_unet.zeros, cacheable=False
    )
}

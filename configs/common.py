"""What the recipes share: a run's bookkeeping, where data come from, betas, what shrinks a run.

A recipe takes these pieces and sets its own figures; nothing here chooses one for it.
"""

from ml_collections import ConfigDict, config_dict

# PixArt's released checkpoints, by variant: directories, and their pictures' sizes in pixels.
PIXART = {
    "xl_256": "PixArt-XL-2-256x256",
    "xl_512": "PixArt-XL-2-512x512",
    "xl_1024": "PixArt-XL-2-1024-MS",
}
PIXART_SIZES = {"xl_256": 256, "xl_512": 512, "xl_1024": 1024}


def check(variant, variants):
    """Raises ValueError for a variant that a recipe does not have."""
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}, use one of {', '.join(variants)}")


def run(task):
    """The keys of a run that no recipe changes, but for the mesh."""
    config = ConfigDict()
    config.task = task
    config.seed = 0
    config.grad_accum = 1
    config.max_to_keep = 2
    config.mesh = ConfigDict({"expert": 1, "data": -1, "fsdp": 1, "tensor": 1})
    config.rules = ()  # of placement, before the library's own (`sharding.MODEL_RULES`)
    return config


def data(source="emoji_scenes"):
    """The training part of a source."""
    return ConfigDict({"source": source, "split": "train", "seed": 0})


def any_data(source="emoji_scenes"):
    """The same, where a run may have a user's own data instead."""
    config = data(source)
    config.root = config_dict.placeholder(str)  # a folder, a cache, a prepared data set
    config.num_examples = config_dict.placeholder(int)  # of the source, all of them unless set
    return config


def adamw(**figures):
    """The optimizer; `train.optimizer.DEFAULTS` names the figures."""
    return ConfigDict({"name": "adamw", **figures})


def betas(name, start, end):
    """A noise schedule of 1,000 steps."""
    return ConfigDict({"name": name, "beta_start": start, "beta_end": end, "num_steps": 1000})


def report(steps, **own):
    """What a finished run on scenes draws and measures, small enough for two cores."""
    return ConfigDict({"num_prompts": 64, "num_real": 1000, "steps": steps, **own})


def student_report():
    """The comparison of a student with its teacher, with one solver of the teacher's."""
    return report((1, 2, 4, 8), reference_steps=50, solvers=("DPM-Solver++",))


def controller_report():
    """The base with and without its controller against the truth of the scenes.

    Depth (sprites fitted to 4 rows of 64 pictures) and KID (features of 1,256) take some 15 CPU
    seconds each.
    """
    metrics = ("control_edges", "control_masks", "control_depth", "scene_accuracy", "kid")
    return report((20,), guidance_scale=3.0, metrics=metrics)


def large(config, size, max_length):
    """Makes it a run of a published size: bfloat16, parameters split over all devices."""
    config.dtype = "bfloat16"
    config.remat = "full"
    config.data.size = size
    config.data.max_length = max_length
    config.mesh.data, config.mesh.fsdp = 1, -1
    return config


def short(config, steps, save_every):
    """Makes it a run of a few steps that saves, draws and ends, to test the plumbing."""
    config.steps, config.batch_size = steps, 8
    config.log_every, config.save_every, config.sample_every = 1, save_every, steps
    config.optimizer.warmup_steps = 2
    return config

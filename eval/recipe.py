"""What a run's config says about its evaluation: where the models are, and which scenes they drew.

A config with `stages` is evaluated by its last one: that one's export is the result.
"""

from pathlib import Path

from cnxs_jax.data import emoji_scenes
from cnxs_jax.data.pipeline import WORLDS
from cnxs_jax.errors import ConfigError
from cnxs_jax.storage import fill
from eval.metrics import features, scene_accuracy

CHECKED = (
    "scene_accuracy",
    "agreement",
    "control_depth",
)  # metrics that read pictures with the scene checker
WITHOUT_CHECKER = f"--metrics=kid works without the checker (features: {features.INSTALL})"


def last_stage(config, workdir):
    """(config, directory) of the last stage, or of the whole run where there are no stages.

    Raises:
        ConfigError: stages that the config does not have.
    """
    stages = config.get("stages")
    if stages is None:
        return config, Path(workdir)
    if not stages or config.get(stages[-1]) is None:
        what = f"config.stages names {stages[-1]!r}, which is not there" if stages else "no stages"
        raise ConfigError(what, "config.stages", "name stages that the config has")
    return config[stages[-1]], Path(workdir) / stages[-1]


def directories(config, workdir, teacher=None, student=None):
    """{"teacher": directory, "student": directory} of the run's pipelines.

    A run that distils (its config has a `teacher_path`) has its export as the student, whichever
    teacher is named. A run that trains a teacher has no student, unless one is named.
    """
    stage, place = last_stage(config, workdir)
    export = str(place / "export")
    if stage.get("teacher_path"):
        teacher = teacher or fill(stage.get("teacher_path"), workdir)
        student = student or export
    found = {"teacher": teacher or export, "student": student}
    return {name: path for name, path in found.items() if path}


def trains_controller(stage):
    """Whether a stage's task is a controller's."""
    return str(stage.get("task", "")).endswith(":controller")


def controller(config, workdir):
    """(directory of the base pipeline, of the controller, its hint, that one's weights or None).

    None where the run trained something else than a controller. The hint of a run without
    `data.hint` is the exact edges.
    """
    stage, place = last_stage(config, workdir)
    if not trains_controller(stage):
        return None
    data = stage.get("data") or {}
    hint, weights = data.get("hint") or "lines", data.get("hint_path")
    return fill(stage.base_path, workdir), str(place / "export" / "controlnet"), hint, weights


def trained_scale(config):
    """The guidance scale that a student of this config has learned, or None.

    In the (1 + omega) form of the LCM papers. Where omega was drawn from a range, the scale of the
    run's own pictures, or that of the range's middle.
    """
    objective = config.get("objective") or {}
    if objective.get("omega_range"):
        return config.get("guidance_scale") or 1.0 + sum(objective["omega_range"]) / 2
    omega = objective.get("omega")
    return None if omega is None else 1.0 + omega


def scenes_of(config, metrics):
    """(world, picture side in pixels) of the scenes that `config.data` names.

    Args:
        config: of a stage or a run (`last_stage`); without `data` the embedded world is meant.
        metrics: to be measured.

    Raises:
        ConfigError: data that are no scenes, or scenes that the metrics' checker cannot read.
    """
    data = config.get("data") or {}
    source, concepts = data.get("source", "emoji_scenes"), data.get("num_concepts")
    if source not in WORLDS:
        fix = (
            "no metric works without scenes; measure the model on the embedded ones: "
            f"--config.data.source=emoji_scenes --config.data.size={scene_accuracy.SIZE}, or on "
            "your own prompts: --pipeline=DIR --prompts=FILE --reference=FOLDER"
        )
        raise ConfigError(f"{source!r} has no scenes to prompt", "config.data.source", fix)
    make, usual = WORLDS[source]
    world = make(**({"num_concepts": concepts} if concepts else {}))
    size = data.get("size") or usual
    if set(CHECKED) & set(metrics):
        check_readable(world, size)
    return world, size


def check_readable(world, size):
    """ConfigError unless the shipped scene checker was fitted for such scenes."""
    known = emoji_scenes.world()
    if world.name != known.name:
        what, key = f"the scene checker reads {known.name}, not {world.name}", "source"
    elif size != scene_accuracy.SIZE:
        what, key = f"the scene checker reads {scene_accuracy.SIZE} px, not {size}", "size"
    elif not set(world.concepts) <= set(known.concepts):
        what = f"the scene checker knows {len(known.concepts)} concepts, not {len(world.concepts)}"
        key = "num_concepts"
    else:
        return
    raise ConfigError(what, f"config.data.{key}", WITHOUT_CHECKER)

"""Questions to a pipeline: pictures of prompts with a fixed noise each, and what they show."""

import numpy as np

from cnxs_jax.data import emoji_scenes
from cnxs_jax.pipelines.images import to_uint8
from eval.metrics import bootstrap, scene_accuracy

BATCH = 64
ONE_A_PROMPT = ("word_masks", "style_image", "image")


def draw(pipe, prompts, seed=0, **options):
    """uint8 [N,H,W,3]: picture n has the noise of image n of `seed`, whatever is asked for.

    Args:
        options: of the pipeline; those of `ONE_A_PROMPT` are lists, one entry a prompt.
    """
    made, batch = [], min(BATCH, len(prompts))
    for start in range(0, len(prompts), batch):
        rows = list(range(start, min(start + batch, len(prompts))))
        padded = rows + rows[-1:] * (batch - len(rows))  # one shape compiles
        own = {k: [v[n] for n in padded] if k in ONE_A_PROMPT else v for k, v in options.items()}
        texts, seeds = [prompts[n] for n in padded], [(seed, n) for n in padded]
        images = pipe(texts, seed=seeds, output_type="np", **own).images
        made.append(to_uint8(images[: len(rows)]))
    return np.concatenate(made)


def seen(images):
    """One list of `Detection`s a picture."""
    return scene_accuracy.load_checker()(images)[0]


def best(detections, concept):
    """The first detection of a concept, or None."""
    return next((d for d in detections if d.concept == concept), None)


def shares(**columns):
    """{name: figure} of columns of verdicts: booleans, or None where there is nothing to judge."""
    found = {}
    for name, values in columns.items():
        judged = np.array([v for v in values if v is not None], bool)
        found[name] = bootstrap.proportion(judged.sum(), len(judged)) if len(judged) else None
    return found


def concepts():
    """The words of the embedded world's things."""
    return emoji_scenes.world().concepts


def several(rng, count):
    """`count` different concepts."""
    words = concepts()
    return [words[i] for i in rng.choice(len(words), count, replace=False)]

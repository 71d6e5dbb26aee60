"""(c) Does a thing appear where its words are painted? (arXiv 2211.01324, section 4.3)

Two things, one painted over the left half and one over the right, in random order; the prompt names
no relation. `present`: both are found. `placed`: both, each with its centre in its half.
"""

import itertools

import numpy as np

from cnxs_jax.control.paint import RECOMMENDED_WEIGHT
from cnxs_jax.data.scenes import with_article
from eval import ask

SWAPPED = f"{RECOMMENDED_WEIGHT}, masks swapped"
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.8)


def questions(number, seed, size):
    """`number` dicts: prompt, (left thing, right thing), masks; the sentence's order is random."""
    left = np.zeros((size, size), np.float32)
    left[:, : size // 2] = 1.0
    asked = []
    for n in range(number):
        rng = np.random.default_rng([seed, n])
        things = ask.several(rng, 2)
        prompt = " and ".join(with_article(word) for word in things)
        on_left, on_right = things if rng.random() < 0.5 else things[::-1]
        masks = {on_left: left, on_right: 1.0 - left}
        asked.append({"prompt": prompt, "things": (on_left, on_right), "masks": masks})
    return asked


def verdict(detections, things, size):
    """`(present, placed)` of one picture; things are the left and the right one."""
    left, right = (ask.best(detections, word) for word in things)
    present = left is not None and right is not None
    return present, bool(present and left.x < size / 2 < right.x)


def study(pipe, number, seed, guidance=(), weights=WEIGHTS):
    """Rows of figures over the weight w', the last with the masks swapped; the first pictures.

    With swapped masks `placed` asks for the swapped places. `guidance`: scales to draw all of it
    with; none: the pipeline's own.
    """
    size = pipe.sizes(None, None)[0][0]
    asked = questions(number, seed, size)
    rows, shown = [], {}
    for scale, weight in itertools.product(guidance or (None,), (*weights, SWAPPED)):
        line, images = painted(pipe, asked, weight, seed, size, scale)
        rows.append({"weight": weight} | ({"guidance": scale} if guidance else {}) | line)
        shown[f"{weight}, guidance {scale}" if guidance else str(weight)] = images[:8]
    return {"rows": rows}, {"prompts": [a["prompt"] for a in asked[:8]], "images": shown}


def painted(pipe, asked, weight, seed, size, guidance_scale=None):
    """(figures, pictures) of one weight, or of the recommended one with the masks swapped."""
    swapped = weight == SWAPPED
    factor = 1.0 if swapped else weight / RECOMMENDED_WEIGHT
    masks = []
    for one in asked:
        order = list(one["masks"].values())[:: -1 if swapped else 1]
        masks.append({w: (m, factor) for w, m in zip(one["masks"], order, strict=True)})
    prompts = [a["prompt"] for a in asked]
    options = {"word_masks": masks, "guidance_scale": guidance_scale}
    images = ask.draw(pipe, prompts, seed, **options)
    things = [a["things"][:: -1 if swapped else 1] for a in asked]
    found = zip(ask.seen(images), things, strict=True)
    verdicts = [verdict(detections, pair, size) for detections, pair in found]
    columns = zip(("present", "placed"), zip(*verdicts, strict=True), strict=True)
    return ask.shares(**dict(columns)), images

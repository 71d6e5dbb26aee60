"""(c) Does a thing appear where its words are painted? (arXiv 2211.01324, section 4.3)

Two things, one painted over the left half and one over the right, in random order; the prompt names
no relation. `present`: both are found. `placed`: both, each with its centre in its half.
"""

import numpy as np

from cnxs_jax.control.paint import RECOMMENDED_WEIGHT
from cnxs_jax.data.scenes import with_article
from eval import ask

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)


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


def study(pipe, number, seed, weights=WEIGHTS):
    """Rows of figures over the weight w', and those with the masks swapped; the last pictures."""
    size = pipe.sizes(None, None)[0][0]
    asked = questions(number, seed, size)
    prompts = [a["prompt"] for a in asked]
    rows, shown = [], {}
    for weight in (*weights, "swapped"):
        swapped = weight == "swapped"
        factor = (RECOMMENDED_WEIGHT if swapped else weight) / RECOMMENDED_WEIGHT
        masks = [
            {w: (m, factor) for w, m in zip(a["masks"], turned(a["masks"], swapped), strict=True)}
            for a in asked
        ]
        images = ask.draw(pipe, prompts, seed, word_masks=masks)
        found = ask.seen(images)
        pairs = [verdict(f, a["things"], size) for f, a in zip(found, asked, strict=True)]
        line = {"weight": f"{RECOMMENDED_WEIGHT}, masks swapped" if swapped else weight}
        rows.append(line | ask.shares(present=[p for p, _ in pairs],
                                          placed=[p for _, p in pairs]))  # fmt: skip
        shown[str(weight)] = images[:8]
    return {"rows": rows}, {"prompts": prompts[:8], "images": shown}


def turned(masks, swapped):
    """The masks in the order of the words, or the other way round."""
    values = list(masks.values())
    return values[::-1] if swapped else values

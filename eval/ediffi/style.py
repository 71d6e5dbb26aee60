"""(d) Does a reference picture give its style, and only that? (arXiv 2211.01324, section 4.2)

Prompts name one thing and no style; the reference is a real scene of another thing. `style`: share
of the pictures with the prompted thing whose style is the reference's. `objects`: share with the
prompted thing. `leaked`: share that shows the reference's thing; `leaked by chance`: that shows the
thing of another picture's reference.
"""

import numpy as np

from cnxs_jax.data import emoji_scenes
from cnxs_jax.data.scenes import with_article
from eval import ask

SCALES = (None, 1.0, 2.0, 4.0, 8.0)  # of the style alone; None: one scale for text and style


def questions(number, seed):
    """`number` dicts: prompt, thing, the reference's picture, thing and style."""
    world, asked = emoji_scenes.world(), []
    held = world.heldout_pairs()
    for n in range(number):
        rng = np.random.default_rng([seed, n])
        thing, other = ask.several(rng, 2)
        style = world.styles[n % len(world.styles)]
        while (other, style) in held or other == thing:  # training has not shown these
            (other,) = ask.several(rng, 1)
        spec = {"concepts": [other], "style": style, "named": ()}
        scene = emoji_scenes.make_scene(rng, spec, split="test", truth=False)
        asked.append({"prompt": with_article(thing), "thing": thing, "other": other,
                      "style": style, "reference": scene["image"]})  # fmt: skip
    return asked


def judge(images, asked):
    """Figures of pictures that were drawn for `asked`."""
    found = ask.seen(images)
    things = [ask.best(f, a["thing"]) for f, a in zip(found, asked, strict=True)]
    style = [t and t.style == a["style"] for t, a in zip(things, asked, strict=True)]
    moved = asked[1:] + asked[:1]

    def judged(o, a):  # another picture's reference must show another thing
        return o is a or o["other"] not in (a["thing"], a["other"])

    def shows(others):
        return [
            ask.best(f, o["other"]) is not None if judged(o, a) else None
            for f, o, a in zip(found, others, asked, strict=True)
        ]

    return ask.shares(
        style=style,
        objects=[t is not None for t in things],
        leaked=shows(asked),
        **{"leaked by chance": shows(moved)},
    )


def study(pipe, number, seed, scales=SCALES):
    """Rows: no reference, then the style's guidance scales; and the first pictures of each."""
    asked = questions(number, seed)
    prompts, references = [a["prompt"] for a in asked], [a["reference"] for a in asked]
    images = ask.draw(pipe, prompts, seed)
    rows, shown = [{"style scale": "no reference"} | judge(images, asked)], {"none": images[:8]}
    for scale in scales:
        images = ask.draw(pipe, prompts, seed, style_image=references, style_scale=scale)
        label = "as the text's" if scale is None else scale
        rows.append({"style scale": label}
                    | judge(images, asked))  # fmt: skip
        shown[str(label)] = images[:8]
    shown = {"references": np.stack(references[:8]), **shown}
    return {"rows": rows}, {"prompts": prompts[:8], "images": shown}

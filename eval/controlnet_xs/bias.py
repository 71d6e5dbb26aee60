"""Do larger controllers bias the base? A hint of one thing, a prompt that names another.

`prompt`: share of the pictures that show what the prompt names; `hint`: that show the thing whose
edges the hint has; a controller that only steers shape leaves the first to the prompt.
"""

import numpy as np

from cnxs_jax.control import hints
from cnxs_jax.data import emoji_scenes
from cnxs_jax.data.scenes import with_article
from eval import ask
from eval.controlnet_xs.arms import HINT
from eval.metrics import bootstrap, edges, scene_maps


def questions(number, seed):
    """`number` dicts: prompt, thing, the hint uint8 [H,W,3], the hint's thing and picture."""
    asked = []
    for n in range(number):
        rng = np.random.default_rng([seed, n])
        thing, other = ask.several(rng, 2)
        scene = emoji_scenes.make_scene(rng, {"concepts": [other], "named": ()}, split="test")
        asked.append({"prompt": with_article(thing), "thing": thing, "other": other,
                      "hint": hints.picture(scene, HINT),
                      "picture": scene["image"]})  # fmt: skip
    return asked


def judge(images, asked):
    """Figures of what was drawn for `asked`."""
    found = ask.seen(images)
    drawn, wanted = (
        scene_maps.edges(images),
        scene_maps.edges(np.stack([a["picture"] for a in asked])),
    )
    figures = ask.shares(**{
        name: [ask.best(f, a[key]) is not None for f, a in zip(found, asked, strict=True)]
        for name, key in (("prompt", "thing"), ("hint", "other"))
    })  # fmt: skip
    return figures | {"edge F1": bootstrap.mean(edges.edge_f1(drawn, wanted, 1.0)["f1"])}


def study(base, controllers, number, seed=0, steps=20, scale=3.0):
    """Rows: the base alone, then each controller, smallest first.

    Args:
        base: a pipeline without control.
        controllers: {name: (Controller, its parameters' number)}.
    """
    asked = questions(number, seed)
    prompts, pictures = [a["prompt"] for a in asked], [a["hint"] / np.float32(255) for a in asked]
    how = {"num_inference_steps": steps, "guidance_scale": scale}
    images = ask.draw(base, prompts, seed, **how)
    rows = [{"controller": "none", "parameters": 0} | judge(images, asked)]
    shown = {"hints": np.stack([a["hint"] for a in asked[:8]]), "none": images[:8]}
    for name, (controller, size) in sorted(controllers.items(), key=lambda item: item[1][1]):
        pipe = base.replace(control=controller)
        images = ask.draw(pipe, prompts, seed, image=pictures, **how)
        rows.append({"controller": name, "parameters": size} | judge(images, asked))
        shown[name] = images[:8]
    return {"rows": rows}, {"prompts": prompts[:8], "images": shown}

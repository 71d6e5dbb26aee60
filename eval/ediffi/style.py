"""(d) Does a reference picture give its style, and only that? (arXiv 2211.01324, section 4.2)

Prompts name one thing and no style; the reference is a real scene of another thing. `style`: share
of the pictures with the prompted thing whose style is the reference's. `objects`: share with the
prompted thing. `leaked`: share that shows the reference's thing; `leaked by chance`: that shows the
thing of another picture's reference. Three bounds stand beside it: the same where the prompt names
the style; how often a linear map of CLIP's embedding of a reference tells its style; and, of a
cascade, the same where the larger stages enlarge real scenes in the place of the base's pictures.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from cnxs_jax.data import emoji_scenes
from cnxs_jax.data.scenes import with_article
from eval import ask
from eval.metrics import bootstrap
from train.parts import to_signed
from train.tasks_ediffi import shrunk

SCALES = (None, 1.0, 2.0, 4.0, 8.0)  # of the style alone; None: one scale for text and style
GUIDED = (None, 4.0)  # those that are drawn with guidance in every stage, too
RIDGE = 1e-3


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


def told_by_clip(pipe, seed, fitted=384, judged=128):
    """Share of new references whose style a ridge regression on CLIP's embeddings tells."""
    asked = questions(fitted + judged, seed + 1)
    z = np.asarray(pipe.embeddings([a["reference"] for a in asked]))
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    z = z - z[:fitted].mean(0)
    styles = list(emoji_scenes.world().styles)
    labels = np.array([styles.index(a["style"]) for a in asked])
    known = z[:fitted]
    gram = known.T @ known + RIDGE * np.eye(z.shape[-1])
    weights = np.linalg.solve(gram, known.T @ np.eye(len(styles))[labels[:fitted]])
    right = (z[fitted:] @ weights).argmax(-1) == labels[fitted:]
    return bootstrap.proportion(right.sum(), judged)


@dataclasses.dataclass(frozen=True)
class Real:
    """A first stage that draws given pictures [B,H,W,3] in [-1, 1], whatever it is asked for."""

    size: int
    sampler: Any
    pictures: Any

    def draw(self, noise, cond, steps=None):
        return self.pictures


def enlarged(pipe, asked, seed):
    """Figures of real scenes of the prompted things in the asked styles, from the base's size on.

    Of the first batch, whose pictures the first stage holds. The larger stages get neither
    reference nor style word.
    """
    asked, scenes = asked[: ask.BATCH], []
    for n, a in enumerate(asked):
        spec = {"concepts": [a["thing"]], "style": a["style"], "named": ()}
        rng = np.random.default_rng([seed, n, 1])  # 1: not those of the questions
        scenes.append(emoji_scenes.make_scene(rng, spec, split="test", truth=False)["image"])
    base = pipe.stages[0]
    small = shrunk(to_signed(jnp.asarray(np.stack(scenes))), base.size)
    first = Real(base.size, base.sampler, small)
    real = dataclasses.replace(pipe, stages=(first, *pipe.stages[1:]))
    return judge(ask.draw(real, [a["prompt"] for a in asked], seed), asked)


def several(pipe):
    """Whether the pipeline has larger stages."""
    return len(getattr(pipe, "stages", ())) > 1


def rows_of(pipe, asked, scales=SCALES):
    """{label: (prompts, options)} of what is drawn."""
    prompts, references = [a["prompt"] for a in asked], [a["reference"] for a in asked]
    named = [f"{a['prompt']}, {a['style']} style" for a in asked]
    found = {"no reference": (prompts, {}), "no reference, the prompt names the style": (named, {})}
    kinds = [(scales, "", {})]
    if several(pipe):
        everywhere = {"guidance_scale": [pipe.defaults()[1]] * len(pipe.stages)}
        kinds += [(GUIDED, ", guidance in every stage", everywhere)]
    for some, words, more in kinds:
        for scale in some:
            label = "as the text's" if scale is None else str(scale)
            options = {"style_image": references, "style_scale": scale, **more}
            found[label + words] = (prompts, options)
    return found


def study(pipe, number, seed):
    """Rows: no reference, then the style's guidance scales; and the first pictures of each."""
    asked = questions(number, seed)
    rows, shown = [], {"references": np.stack([a["reference"] for a in asked[:8]])}
    for label, (prompts, options) in rows_of(pipe, asked).items():
        images = ask.draw(pipe, prompts, seed, **options)
        rows.append({"style scale": label} | judge(images, asked))
        shown[label] = images[:8]
    bounds = [{"bound": "told by CLIP's embedding", "style": told_by_clip(pipe, seed)}]
    if several(pipe):
        bounds += [{"bound": "real scenes, enlarged"} | enlarged(pipe, asked, seed)]
    named = [a["prompt"] for a in asked[:8]]
    return {"rows": rows, "bounds": bounds}, {"prompts": named, "images": shown}

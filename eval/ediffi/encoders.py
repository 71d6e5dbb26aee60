"""(e) T5, CLIP text or both, on short and on long captions (arXiv 2211.01324, section 5)."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from cnxs_jax.data import emoji_scenes
from cnxs_jax.errors import ConfigError
from cnxs_jax.models.conditioning import MASKS
from cnxs_jax.pipelines.ediffi import EDiffIPipeline
from eval import ask
from eval.metrics import scene_accuracy

ROWS = {"T5 and CLIP": (), "T5 alone": ("clip_text_mask",), "CLIP alone": ("text_mask",)}
CAPTIONS = {
    "short": {"count": 1, "named": ()},
    "long": {"count": 3, "named": ("background", "style", "relation")},
}


@dataclasses.dataclass(frozen=True)
class Without(EDiffIPipeline):
    """The cascade with some of its conditions masked, as training drops them.

    Attributes:
        masked: of `MASKS`.
    """

    masked: tuple = ()

    def condition(self, request, style_image):
        cond, null = super().condition(request, style_image)
        gone = {name: jnp.zeros_like(cond[name]) for name in self.masked if name in cond}
        return {**cond, **gone}, null


def without(pipe, *masked):
    """`pipe` with the conditions of these masks switched off."""
    unknown = set(masked) - set(MASKS)
    if unknown:
        raise ValueError(f"unknown masks {unknown}")
    own = {f.name: getattr(pipe, f.name) for f in dataclasses.fields(EDiffIPipeline)}
    return Without(**own, masked=tuple(masked))


def questions(kind, number, seed):
    """(captions, what each says) of held-out scenes of that kind."""
    made = [
        emoji_scenes.make_scene(
            np.random.default_rng([seed, n]), CAPTIONS[kind], split="test", truth=False
        )
        for n in range(number)
    ]
    return [scene["caption"] for scene in made], [scene["prompt"] for scene in made]


def study(pipe, number, seed):
    """Rows: captions x encoders, with the figures of scene accuracy."""
    if pipe.encoders.text is None or pipe.encoders.clip_text is None:
        raise ConfigError(
            "the cascade has not both T5 and CLIP", "--cascade", "train one with both"
        )
    rows, read = [], scene_accuracy.load_checker()
    for kind in CAPTIONS:
        captions, facts = questions(kind, number, seed)
        for name, masked in ROWS.items():
            images = ask.draw(without(pipe, *masked), captions, seed)
            figures, _ = scene_accuracy.score(read, images, facts)
            columns = ("objects", "style", "background", "relation", "items")
            rows.append({"captions": kind, "encoders": name}
                        | {k: figures[k] for k in columns if k in figures})  # fmt: skip
    return {"rows": rows}, None

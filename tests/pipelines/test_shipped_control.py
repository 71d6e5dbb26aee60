"""The shipped controller: the shipped model's pictures follow the lines that it is shown."""

import numpy as np

import cnxs_jax
from cnxs_jax import sample
from cnxs_jax.data import emoji_scenes
from eval import plan
from eval.metrics import scene_maps
from eval.metrics.edges import edge_f1


def test_pictures_follow_the_lines_of_held_out_scenes():
    """Edges within a pixel of the scenes', with the controller and with it at scale 0.

    Another scene's lines are no better than none: it is the lines that are followed.
    """
    shown = plan.prompts(emoji_scenes.world(), "test", 16, size=64, hint="lines")
    wanted = scene_maps.edges(shown.images)
    pipe = cnxs_jax.load_pipeline(sample.DEFAULT_MODEL, control=sample.LINES)

    def found(hints, scale):
        options = {"image": hints, "controlnet_conditioning_scale": scale, "output_type": "np"}
        drawn = pipe(list(shown.captions), num_inference_steps=8, guidance_scale=3.0, seed=0,
                     **options).images  # fmt: skip
        edges = scene_maps.edges(np.round(255 * drawn).astype(np.uint8))
        return edge_f1(edges, wanted)["f1"].mean()

    own, without = found(shown.truth["hint"], 1.0), found(shown.truth["hint"], 0.0)
    others = found(np.roll(shown.truth["hint"], 1, 0), 1.0)
    print(f"edge F1 {own:.2f}, scale 0 {without:.2f}, another scene's lines {others:.2f}")
    assert own > without + 0.25
    assert others < own - 0.25

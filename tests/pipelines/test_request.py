"""Requests: every bad argument is one ConfigError that names it, before any device work."""

import numpy as np
import pytest

from cnxs_jax.errors import ConfigError
from cnxs_jax.pipelines import request

GOOD = {
    "prompt": "a fox",
    "negative_prompt": None,
    "steps": 4,
    "guidance": 4.5,
    "height": None,
    "width": None,
    "repeats": 1,
    "seed": 0,
    "latents": None,
    "output_type": "pil",
}
NAN = np.full((1, 2, 2, 4), np.nan)
BAD = [
    ("prompt", None),
    ("prompt", []),
    ("prompt", 3),
    ("prompt", ["a", None]),
    ("prompt", "x" * 2001),
    ("prompt", ["a"] * 5000),
    ("negative_prompt", ["a", "b"]),
    ("negative_prompt", 1),
    ("negative_prompt", "y" * 2001),
    ("steps", 0),
    ("steps", -1),
    ("steps", 1001),
    ("steps", 4.0),
    ("steps", True),
    ("steps", "4"),
    ("guidance", float("nan")),
    ("guidance", float("inf")),
    ("guidance", -1),
    ("guidance", "4.5"),
    ("height", 0),
    ("width", 10**6),
    ("repeats", 0),
    ("repeats", 1.5),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", 0.5),
    ("seed", None),
    ("seed", [1, 2]),
    ("seed", ["a"]),
    ("latents", np.zeros((2, 2, 2, 4))),
    ("latents", np.zeros((2, 2, 4))),
    ("latents", "noise"),
    ("latents", NAN),
    ("output_type", "png"),
    ("output_type", None),
]
SPOKEN = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
SPOKEN |= {"repeats": "num_images_per_prompt"}


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}-{i}" for i, (n, _) in enumerate(BAD)])
def test_bad_argument_names_itself(name, value):
    with pytest.raises(ConfigError) as caught:
        request.check(**{**GOOD, name: value})
    assert caught.value.where == SPOKEN.get(name, name)
    assert caught.value.code == 2
    assert len(str(caught.value)) < 300


def test_one_seed_counts_images_and_a_list_names_them():
    two = request.check(**{**GOOD, "prompt": ["a", "b"], "repeats": 2, "seed": 9})
    assert two.seeds.tolist() == [9, 9, 9, 9]
    assert two.indices.tolist() == [0, 1, 2, 3]
    named = request.check(**{**GOOD, "repeats": 2, "seed": [2**32 - 1, (5, 3)]})
    assert named.seeds.tolist() == [2**32 - 1, 5]
    assert named.indices.tolist() == [0, 3]


@pytest.mark.parametrize(("scale", "guided"), [(0, False), (1.0, False), (1.01, True)])
def test_guidance_starts_above_one(scale, guided):
    assert request.check(**{**GOOD, "guidance": scale}).guided is guided


def test_one_negative_text_serves_all_prompts():
    made = request.check(**{**GOOD, "prompt": ["a", "b"], "negative_prompt": "c"})
    assert made.negatives == ["c", "c"]


def test_unused_arguments_are_refused_by_name():
    defaults = {"image": None, "scale": 1.0}
    request.refuse_unused({"image": None, "scale": 1}, defaults, "no controller")
    with pytest.raises(ConfigError, match="`image` has no effect here: no controller"):
        request.refuse_unused({"image": np.zeros(3), "scale": 1.0}, defaults, "no controller")

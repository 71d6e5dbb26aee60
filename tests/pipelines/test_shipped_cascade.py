"""The shipped cascade of eDiff-I, from a prompt to 64 pixels."""

from pathlib import Path

import cnxs_jax
from eval import ask

SHIPPED = Path(cnxs_jax.__file__).parent / "assets" / "ediffi_tiny"


def test_the_shipped_cascade_draws_what_it_is_asked_for():
    """The checker finds the things in their pictures, and not in those of other prompts."""
    words = ask.concepts()[::2]
    pictures = ask.draw(cnxs_jax.load_pipeline(SHIPPED), [f"a {word}" for word in words])
    assert pictures.shape == (len(words), 64, 64, 3)
    seen = ask.seen(pictures)
    found = [ask.best(own, word) is not None for own, word in zip(seen, words, strict=True)]
    others = [ask.best(own, word) is not None for own, word in zip(seen[1:], words, strict=False)]
    assert sum(found) >= 0.6 * len(words)
    assert sum(others) <= 0.25 * len(words)

"""Caption cleaning against diffusers' PixArtAlphaPipeline (with Beautiful Soup and ftfy)."""

import numpy as np
import pytest

from cnxs_jax.data import caption_cleaning

pytestmark = pytest.mark.parity

CAPTIONS = [
    "A <b>Tiger</b> &amp; a frog &quot;in&quot; the &lt;snow&gt;",
    "tiger, see https://example.com/a/b?c=d and www.tigers.org/x_y or tigers.co",
    "photo by @some_one, jc6640 jc6640vc 6640vc231 j2d1a2a 123456789 #12 #12345",
    "file_name.jpeg of a tiger.png 640x480 1.5×2 192.168.0.1 page 12",
    "free download tiger png images, worldwide free shipping, click for more",
    "this-is-my-cute-cat and_this_is_mine",
    "one-two three_four",
    "***SALE*** a tiger ... on . a / rock ~ (big) [small] {x} |y|",
    "“quoted” ‘single’ «guillemets» — dash – dash ― dash",
    "老虎 tiger 虎 ㍿ カタカナ",
    "'leading and trailing'",
    '"a tiger"',
    ",a tiger,",
    "a%20tiger+on%2Fa rock",
    "a tiger : a frog,and a fish.then",
    "<person> with a tiger",
    ".hidden",
    "line\\nbreak\nnew   line\ttab 5:30 ",
    "Crème brûlée 3d style, 4k, f16",
    "",
]
PIECES = ["a", "tiger", ".", ",", "-", "_", "@", "#", "12", "345678", "x", " ", "  ", "/", ":"]
PIECES += ["'", '"', "com", "png", "www", "<b>", "&amp;", "(", "]", "é", "—", "虎", "page", "\n"]


@pytest.fixture(scope="module")
def reference():
    from diffusers import PixArtAlphaPipeline

    bare = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)
    return lambda caption: bare._clean_caption(bare._clean_caption(caption))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_written_captions(reference, caption):
    assert caption_cleaning.clean_caption(caption) == reference(caption)


def test_random_captions(reference):
    rng = np.random.default_rng(0)
    for _ in range(1000):
        caption = "".join(rng.choice(PIECES, rng.integers(1, 25)))
        assert caption_cleaning.clean_caption(caption) == reference(caption), repr(caption)

"""Kept pictures: made once, never mixed, shared between processes."""

import numpy as np
import pytest
from PIL import Image

from cnxs_jax.errors import ConfigError
from eval import draw, plan

ROW = plan.Row("pipeline", "pipeline", steps=4, guided=True, guidance_scale=3.0)
PROMPTS = plan.Prompts("test", [f"picture {n}" for n in range(7)])


class Painter:
    """Paints a picture with its index; `left` calls until it is stopped."""

    def __init__(self, left=100):
        self.drawn, self.left = [], left

    def __call__(self, row, captions, seeds):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.drawn += [n for _, n in seeds]
        return np.stack([np.full((4, 6, 3), n, np.uint8) for _, n in seeds])


def gallery(painter, tmp_path, digest="a", **options):
    options = {"batch_size": 2, "log": lambda s: None} | options
    return draw.Gallery(painter, tmp_path, {"pipeline": {"pipeline": digest}}, **options)


def test_a_stopped_row_goes_on_where_it_was(tmp_path):
    first, second = Painter(left=2), Painter()
    with pytest.raises(KeyboardInterrupt):
        gallery(first, tmp_path)(ROW, PROMPTS)
    assert first.drawn == [0, 1, 2, 3]
    images = gallery(second, tmp_path)(ROW, PROMPTS)
    assert second.drawn == [4, 5, 6]
    assert images[:, 0, 0, 0].tolist() == list(range(7))
    third = Painter()
    more = plan.Prompts("test", [*PROMPTS.captions, "one more"])
    assert len(gallery(third, tmp_path)(ROW, more)) == 8
    assert third.drawn == [7]


def test_damaged_pictures_are_drawn_again(tmp_path):
    gallery(Painter(), tmp_path)(ROW, PROMPTS)
    files = sorted(tmp_path.rglob("*.png"))
    files[1].write_bytes(files[1].read_bytes()[:-30])
    files[2].write_bytes(b"")
    Image.open(files[3]).save(files[3])  # without what it was made with
    painter = Painter()
    images = gallery(painter, tmp_path)(ROW, PROMPTS)
    assert painter.drawn == [1, 2, 3]
    assert images[:, 0, 0, 0].tolist() == list(range(7))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "b"}, 'pipeline was "a", is "b"'),
        ({"seed": 5}, r"seed was \[0, 0\], is \[5, 0\]"),
    ],
)
def test_pictures_of_other_settings_are_refused(tmp_path, change, said):
    gallery(Painter(), tmp_path)(ROW, PROMPTS)
    painter = Painter()
    with pytest.raises(ConfigError, match=said) as caught:
        gallery(painter, tmp_path, **change)(ROW, PROMPTS)
    assert "--redraw" in caught.value.fix
    assert painter.drawn == []
    gallery(painter, tmp_path, redraw=True, **change)(ROW, PROMPTS)
    assert painter.drawn == list(range(7))


def test_other_prompts_are_refused_and_other_rows_lie_elsewhere(tmp_path):
    gallery(Painter(), tmp_path)(ROW, PROMPTS)
    with pytest.raises(ConfigError, match='prompt was "picture 0", is "another"'):
        gallery(Painter(), tmp_path)(ROW, plan.Prompts("test", ["another"]))
    painter = Painter()
    other = plan.Row("pipeline", "pipeline", steps=4, guided=True, guidance_scale=3.5)
    gallery(painter, tmp_path)(other, PROMPTS)
    assert painter.drawn == list(range(7))


def test_processes_draw_disjoint_shares_of_whole_batches(tmp_path):
    painters = [Painter(), Painter()]
    for index, painter in enumerate(painters):
        gallery(painter, tmp_path).draw_share(ROW, PROMPTS, index, 2)
    assert [p.drawn for p in painters] == [[0, 1, 4, 5], [2, 3, 6]]
    last = Painter()
    assert gallery(last, tmp_path)(ROW, PROMPTS)[:, 0, 0, 0].tolist() == list(range(7))
    assert last.drawn == []

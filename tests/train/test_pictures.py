"""Pictures for people: the range, the refusal of NaN, the grid."""

import numpy as np
import pytest

from cnxs_jax.errors import NumericsError
from train.pictures import grid, to_uint8


def test_the_ends_and_the_middle_of_the_range():
    np.testing.assert_array_equal(to_uint8(np.array([-1.0, -2.0, 0.0, 1.0, 3.0])),
                                  [0, 0, 128, 255, 255])  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_is_a_numerics_error(bad):
    with pytest.raises(NumericsError, match="1 of 6 values") as error:
        to_uint8(np.array([[0.0, bad, 1.0], [0.0, 0.0, 0.0]]))
    assert error.value.code == 5


def test_grid_fills_its_last_row_with_white():
    images = np.stack([np.full((2, 2, 3), i, np.uint8) for i in range(3)])
    np.testing.assert_array_equal(grid(images, 2)[::2, ::2, 0], [[0, 1], [2, 255]])

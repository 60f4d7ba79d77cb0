"""Which connected parts of a mask count as specks."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mal_train.kernel.labeler.components import has_second_part, remove_small_regions


def parts_of(*sizes: int) -> NDArray[np.bool_]:
    """A row for each size, so many pixels long."""
    mask = np.zeros((2 * len(sizes), max(sizes)), bool)
    for at, size in enumerate(sizes):
        mask[2 * at, :size] = True
    return mask


@pytest.mark.parametrize(
    ("sizes", "least_px", "left"),
    [
        ((20, 3, 5), 0, 28),
        ((20, 3, 5), 1, 28),
        ((20, 3, 5), 4, 25),
        ((20, 3, 5), 5, 25),
        ((20, 3, 5), 6, 20),
        ((20, 3, 5), 1000, 20),
        ((4,), 100, 4),
    ],
)
def test_parts_below_the_limit_go_and_the_largest_stays(sizes: tuple[int, ...], least_px: int, left: int) -> None:
    mask = parts_of(*sizes)
    kept = remove_small_regions(mask, least_px)
    assert np.count_nonzero(kept) == left
    assert not (kept & ~mask).any()


def test_pixels_that_touch_at_a_corner_are_one_part() -> None:
    mask = np.eye(6, dtype=bool)
    np.testing.assert_array_equal(remove_small_regions(mask, 5), mask)


def test_an_empty_mask_stays_empty() -> None:
    assert not remove_small_regions(np.zeros((4, 5), bool), 10).any()
    assert remove_small_regions(np.zeros((0, 0), bool), 10).shape == (0, 0)


def test_a_part_of_one_percent_is_a_second_part() -> None:
    assert has_second_part(parts_of(98, 1))
    assert not has_second_part(parts_of(100, 1))

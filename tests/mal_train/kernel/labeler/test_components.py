"""Removal of small components, and detection of a second one."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mal_train.kernel.labeler.components import has_second_component, remove_small_regions


def mask_with_components(*sizes: int) -> NDArray[np.bool_]:
    """Returns a mask with one row of pixels for each size."""
    mask = np.zeros((2 * len(sizes), max(sizes)), bool)
    for index, size in enumerate(sizes):
        mask[2 * index, :size] = True
    return mask


@pytest.mark.parametrize(
    ("sizes", "min_area_px", "remaining"),
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
def test_components_below_the_limit_are_removed_except_the_largest(
    sizes: tuple[int, ...], min_area_px: int, remaining: int
) -> None:
    mask = mask_with_components(*sizes)
    kept = remove_small_regions(mask, min_area_px)
    assert np.count_nonzero(kept) == remaining
    assert not (kept & ~mask).any()


def test_pixels_that_touch_at_a_corner_are_one_component() -> None:
    mask = np.eye(6, dtype=bool)
    np.testing.assert_array_equal(remove_small_regions(mask, 5), mask)


def test_an_empty_mask_stays_empty() -> None:
    assert not remove_small_regions(np.zeros((4, 5), bool), 10).any()
    assert remove_small_regions(np.zeros((0, 0), bool), 10).shape == (0, 0)


def test_a_component_of_one_percent_counts_as_a_second_one() -> None:
    assert has_second_component(mask_with_components(98, 1))
    assert not has_second_component(mask_with_components(100, 1))

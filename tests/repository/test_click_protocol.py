"""The simulated user of `benchmarks.clicks`: where the next click is, and how clicks are counted."""

from collections.abc import Sequence

import numpy as np

from benchmarks.clicks.protocol import clicks_to, next_click, simulated
from mal_train.core.masks.points import Point


def test_the_next_click_is_in_the_middle_of_the_largest_error() -> None:
    truth = np.zeros((20, 30), bool)
    truth[2:11, 3:12] = True
    mask = np.zeros_like(truth)
    mask[15:18, 20:25] = True
    assert next_click(mask, truth) == Point(7.5, 6.5, is_positive=True)
    assert next_click(mask, truth, 100, 50) == Point(107.5, 56.5, is_positive=True)
    mask |= truth
    assert next_click(mask, truth) == Point(21.5, 16.5, is_positive=False)
    assert next_click(truth, truth) is None


def test_a_mask_without_errors_keeps_its_iou() -> None:
    def correct(points: Sequence[Point]) -> tuple[float, Point | None]:
        return (0.5, Point(0.5, 0.5, is_positive=True)) if len(points) < 2 else (1.0, None)

    ious = simulated(correct, 4)
    assert ious == [0.5, 0.5, 1.0, 1.0, 1.0]
    assert clicks_to(ious, 0.9) == 2

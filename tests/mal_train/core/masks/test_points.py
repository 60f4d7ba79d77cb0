"""Points that correct masks: which are accepted, and the reason for which others are not."""

import math

import pytest

from mal_train.core.errors import BadPoint
from mal_train.core.masks.geometry import Region
from mal_train.core.masks.points import MAX_POINTS, Point, check_points

HW = (20, 30)
BOX = Region(5, 4, 15, 12)


def positive(x: float, y: float) -> Point:
    return Point(x, y, is_positive=True)


def negative(x: float, y: float) -> Point:
    return Point(x, y, is_positive=False)


@pytest.mark.parametrize(
    "points",
    [
        (),
        (positive(5, 4), positive(14.99, 11.99)),
        (negative(0, 0), negative(29.99, 19.99), positive(7.5, 7.5)),
        (positive(7.2, 7.2), positive(7.8, 7.8)),
        tuple(positive(7, 7) for _ in range(MAX_POINTS)),
    ],
)
def test_points_that_a_mask_can_obey_are_accepted_unchanged(points: tuple[Point, ...]) -> None:
    assert check_points(points, HW, BOX) == points


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([positive(math.nan, 7)], "POINT_NOT_FINITE"),
        ([negative(7, math.inf)], "POINT_NOT_FINITE"),
        ([negative(30, 7)], "POINT_OUTSIDE_IMAGE"),
        ([negative(-0.01, 7)], "POINT_OUTSIDE_IMAGE"),
        ([positive(7, 20)], "POINT_OUTSIDE_IMAGE"),
        ([positive(4.99, 7)], "POINT_OUTSIDE_BOX"),
        ([positive(7, 12)], "POINT_OUTSIDE_BOX"),
        ([positive(7.2, 7.2), negative(7.8, 7.8)], "POINTS_CONTRADICT"),
        ([negative(0, 0), positive(7, 7), negative(7, 7)], "POINTS_CONTRADICT"),
        ([positive(7, 7)] * (MAX_POINTS + 1), "TOO_MANY_POINTS"),
    ],
)
def test_points_that_no_mask_can_obey_are_refused_with_the_reason(points: list[Point], reason: str) -> None:
    with pytest.raises(BadPoint) as caught:
        check_points(points, HW, BOX, "box 3")
    assert caught.value.reason == reason
    assert str(caught.value).startswith("box 3: ")


def test_a_box_without_a_pixel_takes_no_positive_point() -> None:
    with pytest.raises(BadPoint):
        check_points([positive(5, 4)], HW, Region(5, 4, 5, 9))

"""Points that correct a mask: pixels of the image that a user states to be inside or outside of it.

The pixel at column c and row r covers [c, c + 1) x [r, r + 1) in px of the stored image, as for boxes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from mal_train.core.errors import BadPoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mal_train.core.masks.geometry import Region

MAX_POINTS = 64
"""Largest number of points of one instance."""


class Point(NamedTuple):
    """A pixel that belongs to the mask of an instance, or does not.

    >>> Point(12.7, 3, is_positive=True).pixel
    (12, 3)

    Attributes:
        x: distance from the left border of the image in px.
        y: distance from its upper border in px.
        is_positive: True: the pixel is in the mask; False: it is not.
    """

    x: float
    y: float
    is_positive: bool

    @property
    def pixel(self) -> tuple[int, int]:
        """Column and row of the pixel that contains the point, which must be finite."""
        return math.floor(self.x), math.floor(self.y)


def check_points(
    points: Sequence[Point], image_hw: tuple[int, int], mask_region: Region, name: str = "box"
) -> tuple[Point, ...]:
    """Returns the points of an instance if a mask can obey all of them.

    A negative point outside `mask_region` is valid: every mask obeys it.

    Args:
        points: points of the instance, in px of the image.
        image_hw: height and width of the image in px.
        mask_region: pixels that the mask of the instance may cover.
        name: name of the box in messages.

    Raises:
        BadPoint: a point or the set of points breaks a rule; its `reason` states which.
    """
    if len(points) > MAX_POINTS:
        # Not their number: callers may stop reading points at the first one too many.
        raise BadPoint(f"more than {MAX_POINTS} points; send at most {MAX_POINTS} of a box", "TOO_MANY_POINTS", name)
    is_positive: dict[tuple[int, int], bool] = {}
    for index, point in enumerate(points):
        where = f"point {index} at {point.x:g}, {point.y:g}"
        _check_point(point, image_hw, mask_region, where, name)
        if is_positive.setdefault(point.pixel, point.is_positive) != point.is_positive:
            column, row = point.pixel
            raise BadPoint(
                f"{where}: column {column}, row {row} has a positive and a negative point; remove one of them",
                "POINTS_CONTRADICT",
                name,
            )
    return tuple(points)


def _check_point(point: Point, image_hw: tuple[int, int], mask_region: Region, where: str, name: str) -> None:
    height, width = image_hw
    if not (math.isfinite(point.x) and math.isfinite(point.y)):
        raise BadPoint(f"{where}; it must be two finite numbers x, y", "POINT_NOT_FINITE", name)
    if not (0 <= point.x < width and 0 <= point.y < height):
        raise BadPoint(f"{where}; it must lie inside its image of {width}x{height} px", "POINT_OUTSIDE_IMAGE", name)
    if point.is_positive and not mask_region.contains(*point.pixel):
        raise BadPoint(
            f"{where}: a positive point must lie inside its box, which covers {_described(mask_region)}; enlarge the "
            "box or remove the point",
            "POINT_OUTSIDE_BOX",
            name,
        )


def _described(region: Region) -> str:
    if region.is_empty:
        return "no pixel"
    return f"columns {region.col0} to {region.col1 - 1} and rows {region.row0} to {region.row1 - 1}"

"""Geometry of boxes that are given by four corners or by an angle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from mal_train.core.coco.fields import UPRIGHT_PX

RELATIVE_TOLERANCE: Final = 0.02
"""The sides of a rectangle may differ, and deviate from a right angle, by this share of the longer side."""


def extent(points: Sequence[float]) -> tuple[float, float, float, float]:
    """Returns left, top, right, bottom of points, each an x and a y.

    >>> extent([3, 1, 5, 2, 4, 9])
    (3, 1, 5, 9)
    """
    xs, ys = points[0::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def is_upright(corners: Sequence[float]) -> bool:
    """Returns True if four corners, in px and in any order around the box, are those of an upright box."""
    x0, y0, x1, y1 = extent(corners)
    kinds = set()
    for x, y in zip(corners[0::2], corners[1::2], strict=True):
        if min(x - x0, x1 - x) > UPRIGHT_PX or min(y - y0, y1 - y) > UPRIGHT_PX:
            return False
        kinds.add((x - x0 < x1 - x, y - y0 < y1 - y))
    return len(kinds) == 4


def is_rectangle(corners: Sequence[float]) -> bool:
    """Returns True if four corners in px, in order around the box, are those of a rectangle at any angle."""
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = zip(corners[0::2], corners[1::2], strict=True)
    side, next_side = (bx - ax, by - ay), (cx - bx, cy - by)
    length, next_length = math.hypot(*side), math.hypot(*next_side)
    longest = max(length, next_length)
    if min(length, next_length) == 0 or not math.isfinite(longest):
        return False
    tolerance = UPRIGHT_PX + RELATIVE_TOLERANCE * longest
    is_closed = math.hypot(ax + cx - bx - dx, ay + cy - by - dy) <= tolerance
    projection = abs(side[0] * next_side[0] + side[1] * next_side[1]) / longest
    return is_closed and projection <= tolerance


def corners_of(cx: float, cy: float, w: float, h: float, angle: float) -> tuple[float, ...]:
    """Returns the corners x0, y0, … x3, y3 of a box of center, size and angle in radians, clockwise on the screen."""
    cos, sin = math.cos(angle), math.sin(angle)
    return tuple(
        value
        for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        for value in (cx + (sx * w * cos - sy * h * sin) / 2, cy + (sx * w * sin + sy * h * cos) / 2)
    )

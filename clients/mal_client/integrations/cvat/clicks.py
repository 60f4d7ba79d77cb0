"""Converts the clicks of CVAT's interactors to points. Needs no SDK of CVAT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mal_client.types import Point
from mal_train.core.errors import InputError


def read_clicks(positive: Any, negative: Any) -> list[Point]:
    """Returns the positive points, then the negative ones.

    >>> read_clicks([(3.5, 4)], None)
    [Point(x=3.5, y=4.0, is_positive=True)]

    Args:
        positive: x, y in px of each; None: no points.
        negative: the same.

    Raises:
        InputError: a point is not a pair of numbers.
    """
    return [*_points(positive, "pos_points", is_positive=True), *_points(negative, "neg_points", is_positive=False)]


def _points(clicks: Sequence[Sequence[float]] | None, name: str, *, is_positive: bool) -> list[Point]:
    try:
        return [Point(float(x), float(y), is_positive) for x, y in clicks or ()]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name}: invalid; each point must be two numbers x, y") from None

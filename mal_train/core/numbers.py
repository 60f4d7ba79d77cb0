"""Reads numbers of files from outside, whose values JSON allows and a float cannot hold."""

import math


def finite_number(value: object) -> float | None:
    """Returns a JSON value as float; None if it is no number, not finite, or an integer above the range of floats.

    >>> finite_number(2), finite_number(True), finite_number(10**400)
    (2.0, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None

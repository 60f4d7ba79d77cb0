"""Reads numbers of files from outside, whose values JSON allows and a float cannot hold; writes counts."""

import math


def finite_number(value: object) -> float | None:
    """Returns a JSON value as float; None if it is no number, not finite, or an integer above the range of floats.

    >>> finite_number(2), finite_number(True), finite_number(10**400)
    (2.0, None, None)
    """
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def number_of(text: str) -> float | None:
    """Returns a number that is written as text; None if it is no number, not finite, or has Python's "_".

    >>> number_of(" 30.5 "), number_of("1_0"), number_of("nan")
    (30.5, None, None)
    """
    try:
        return None if "_" in text else finite_number(float(text))
    except ValueError:
        return None


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun, in the plural unless it is 1.

    >>> counted(1, "class"), counted(0, "box"), counted(2, "category"), counted(3, "row group")
    ('1 class', '0 boxes', '2 categories', '3 row groups')
    """
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y"):
        return f"{count} {noun[:-1]}ies"
    return f"{count} {noun}{'es' if noun.endswith(('s', 'x', 'ch')) else 's'}"

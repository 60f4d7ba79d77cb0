"""Consideration for other threads: how long threads of numeric libraries spin, and objects hold the interpreter."""

import os
from typing import Any, Final

_PART: Final = 1000


def wait_passively() -> None:
    """Makes OpenMP threads sleep at barriers instead of spinning, unless OMP_WAIT_POLICY is set.

    Call it before torch is imported.

    Spinning assumes dedicated cores. On a machine with two cores, one other busy process (a loader process, for
    example) made training eight times slower: 0.33 instead of 2.62 steps/s with the recipe of the demo.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def clear_in_parts(values: "list[Any] | dict[Any, Any] | set[Any]") -> None:
    """Empties a collection whose elements have no other references.

    Deleting it, or `clear`, would free all of them in one piece, during which no other thread runs: half a second for a
    million objects with their parts.
    """
    if isinstance(values, list):
        while values:
            del values[-_PART:]
    elif isinstance(values, dict):
        while values:
            values.popitem()
    else:
        while values:
            values.pop()

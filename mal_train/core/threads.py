"""Consideration for other threads: how long threads of numeric libraries spin, and objects hold the interpreter."""

import os
from typing import Any, Final

_PART: Final = 1000
_SPINS: Final = 30_000
"""Rounds of a waiting loop of libgomp, with some 40 to 140 cycles each."""


def wait_passively() -> None:
    """Makes OpenMP threads sleep at barriers instead of spinning, unless OMP_WAIT_POLICY is set.

    Call it before torch is imported.

    Spinning assumes dedicated cores. On a machine with two cores, one other busy process (a loader process, for
    example) made training eight times slower: 0.33 instead of 2.62 steps/s with the recipe of the demo.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def spin_briefly() -> None:
    """Makes OpenMP threads spin at barriers for about a millisecond, then sleep, unless the environment sets a policy.

    Call it before torch is imported. For forward passes, which wait some hundred microseconds at most for threads that
    run: sleeping takes twice the time of a lone pass (41 ms instead of 20, two idle cores). Unlimited spinning takes
    the core from others. Training waits passively, since loader processes always share its cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))


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

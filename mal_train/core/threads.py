"""Sets the wait policy of the threads of numeric libraries. Call it before torch is imported."""

import os


def wait_passively() -> None:
    """Makes OpenMP threads sleep at barriers instead of spinning, unless OMP_WAIT_POLICY is set.

    Spinning assumes dedicated cores. On a machine with two cores, one other busy process (a loader process, for
    example) made training eight times slower: 0.33 instead of 2.62 steps/s with the recipe of the demo.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

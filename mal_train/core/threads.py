"""How threads of numeric libraries wait for each other. To be called before torch is imported."""

import os


def wait_passively() -> None:
    """Let OpenMP's threads sleep at barriers instead of spinning, unless the environment says otherwise.

    Spinning assumes cores of one's own. With one other busy process on a machine of two cores it made training eight
    times slower (0.33 against 2.62 steps/s of the demo's recipe), and a loader process is such a one.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

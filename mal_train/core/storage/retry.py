"""Repeats requests to stores after transient errors, a bounded number of times with growing pauses."""

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from mal_train.core.errors import StoreUnreachable

Result = TypeVar("Result")

ATTEMPTS: Final = 5
FIRST_PAUSE_S = 0.5
"""Mean pause before the second attempt; doubled before each further one. 7.5 s in all."""
LONGEST_PAUSE_S: Final = 30.0
TRAINING_ATTEMPTS: Final = 9
"""Attempts of a training, which cannot continue from any image: pauses of some 90 s in all."""

CONNECT_TIMEOUT_S: Final = 10.0
READ_TIMEOUT_S: Final = 30.0
"""Seconds without a byte after which an attempt ends."""
ATTEMPT_TIMEOUT_S: Final = 60.0
"""Seconds of an attempt, without the transfer itself."""
SLOWEST_BYTES_PER_S: Final = 64 * 1024
"""Rate below which a transfer counts as stuck, although bytes arrive now and then."""


class Transient(Exception):
    """An attempt that failed for a reason that may pass: overload, timeout, broken connection.

    Args:
        reason: short text for the message; never the text of another program's error, which may hold a URL.
    """


def attempt_timeout_s(size_bytes: int = 0) -> float:
    """Returns the seconds after which one attempt to transfer this number of bytes ends.

    >>> attempt_timeout_s(), attempt_timeout_s(32 * 1024 * 1024)
    (60.0, 572.0)
    """
    return ATTEMPT_TIMEOUT_S + size_bytes / SLOWEST_BYTES_PER_S


def with_retries(
    attempt: Callable[[], Result],
    name: str,
    *,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], object] = time.sleep,
) -> Result:
    """Returns the result of `attempt`, which is repeated when it raises `Transient`.

    Args:
        attempt: one request.
        name: redacted address; begins the message.
        attempts: number of attempts, 1 or more.
        sleep: waits for a number of seconds.

    Raises:
        StoreUnreachable: every attempt failed.
    """
    for number in range(1, attempts + 1):
        try:
            return attempt()
        except Transient as error:
            if number == attempts:
                tries = "" if attempts == 1 else f" ({attempts} attempts)"
                raise StoreUnreachable(
                    f"{name}: the store does not answer: {error}{tries}; check the network and the address, then run "
                    "the command again"
                ) from None
        # Spread out: many readers fail together, and would come back together.
        sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (number - 1)) * random.uniform(0.5, 1.5))
    raise AssertionError("one attempt at least")

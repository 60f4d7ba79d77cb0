"""Limits the rate of refusals to strangers who send one call after another, as a client with a wrong token does.

Strangers who send many calls at once are not limited: a waiting call takes memory, so few wait, and none for long.
"""

import asyncio
import time
from collections.abc import Callable

MAX_DELAY_S = 1.0


class RateLimiter:
    """Delays events that come faster than a rate, in order of arrival (generic cell rate algorithm).

    Callers who wait for one event before they cause the next one come no faster than the rate. An event waits at most
    MAX_DELAY_S, and not at all while `max_waiting` others wait: callers who cause many events at once are not limited.

    Args:
        per_s: rate of events.
        burst: events that may come at once.
        max_waiting: events that wait at once.
        clock: monotonic seconds.
    """

    def __init__(
        self, per_s: float, *, burst: int, max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = 1 / per_s
        self._tolerance_s = burst / per_s
        self._max_waiting = max_waiting
        self._clock = clock
        self._next_at = clock()
        """Time of the next event if all came at the rate."""
        self._waiting = 0

    async def acquire(self) -> None:
        """Waits until the next event may happen."""
        delay_s = self._delay_s()
        if delay_s <= 0 or self._waiting >= self._max_waiting:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(delay_s)
        finally:
            self._waiting -= 1

    def _delay_s(self) -> float:
        now = self._clock()
        at = min(max(self._next_at, now), now + self._tolerance_s + MAX_DELAY_S)
        self._next_at = at + self._interval_s
        return at - self._tolerance_s - now

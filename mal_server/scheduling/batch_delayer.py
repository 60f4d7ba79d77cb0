"""Predicts whether more requests are about to arrive, so that an idle device may wait for a fuller batch.

Reads no clock: the batcher passes the time.
"""

import math


class BatchDelayer:
    """Tracks the requests that may soon add items: those in preparation, and the next ones of clients just answered.

    Many clients send their next request right after an answer. If a batch starts before it arrives, that request misses
    the batch and waits for the following one. Requests do not name their client, so a new request counts as the one
    that has been expected for longest.

        on_admit → on_submit → on_answer → on_close      a request in the normal case; on_close may come at any time

    Args:
        return_window_s: time after the end of an answered request in which its client may send the next one.
    """

    def __init__(self, return_window_s: float) -> None:
        self._return_window_s = return_window_s
        self._preparing: set[object] = set()
        self._answered: dict[object, float] = {}
        """Answered request → time until which the next request of its client is expected.

        The time is math.inf until the request is closed. Closed requests are in order of time.
        """

    def on_admit(self, request: object) -> None:
        """Records a request whose items are being prepared, and ends the wait for one expected request."""
        self._preparing.add(request)
        if self._answered:
            del self._answered[next(iter(self._answered))]

    def on_submit(self, request: object) -> None:
        """Records that the items of a request are in the queue."""
        self._preparing.discard(request)

    def on_answer(self, request: object) -> None:
        """Records that all items of a request have finished."""
        self._answered[request] = math.inf

    def on_close(self, request: object, now: float) -> None:
        """Records the end of a request, answered or not."""
        self._preparing.discard(request)
        if self._answered.pop(request, None) is not None:
            self._answered[request] = now + self._return_window_s

    def wait_until(self, now: float) -> float:
        """Returns the time until which more items may arrive; `now` if none are expected, math.inf if it is unknown."""
        while self._answered and next(iter(self._answered.values())) <= now:
            del self._answered[next(iter(self._answered))]
        if self._preparing:
            return math.inf
        return max(self._answered.values(), default=now)

"""Predicts whether more requests are about to arrive, so that an idle device may wait for a fuller batch.

Reads no clock: the batcher passes the time.
"""

import math


class BatchDelayer:
    """Tracks requests that may soon add items: those being prepared, and clients that may send their next one.

    A client in a closed loop sends its next request right after an answer; a batch that starts without it leaves it to
    the one after. The client of a new request is unknown, so it counts as the one that has been expected for longest.

    Args:
        return_window_s: time after the end of a request in which its client is expected to send the next one.
    """

    def __init__(self, return_window_s: float) -> None:
        self._return_window_s = return_window_s
        self._preparing: set[object] = set()
        self._answered: dict[object, float] = {}
        """Answered request → time until which its client is expected; math.inf while the answer is being written.

        Closed requests are in order of that time.
        """

    def on_admit(self, request: object) -> None:
        """Records a request whose items are being prepared."""
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
        """Returns the time until which more items may arrive; at most `now` if none are expected."""
        while self._answered and next(iter(self._answered.values())) <= now:
            del self._answered[next(iter(self._answered))]
        if self._preparing:
            return math.inf
        return max(self._answered.values(), default=now)

"""Who may be about to bring work: whether waiting may fill a batch that is not full. Told the time; asks no clock."""

import math


class BatchDelayer:
    """Who may be about to bring items: requests in preparation, and callers who were just answered and may come again.

    Callers in a closed loop come back within moments of their answer, so a batch that starts without them would leave
    them to the next one. A newcomer counts as the one of them who was answered first.

    Args:
        patience_s: how long after its request is over a caller is expected back.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._preparing = 0
        self._answered: dict[object, float] = {}
        """Request → when its caller is no longer expected; math.inf while its answer is being written."""

    def arrives(self) -> None:
        """A request was admitted and is being prepared."""
        self._preparing += 1
        if self._answered:
            del self._answered[next(iter(self._answered))]

    def settles(self) -> None:
        """A request in preparation brought its items, or will bring none."""
        self._preparing -= 1

    def answers(self, request: object) -> None:
        """All items of a request are done."""
        self._answered[request] = math.inf

    def leaves(self, request: object, now: float) -> None:
        """A request is over."""
        if self._answered.pop(request, None) is not None:
            self._answered[request] = now + self._patience_s

    def expected_until(self, now: float) -> float:
        """When nobody will be expected any more, unless something happens before; at most `now` when nobody is."""
        while self._answered and next(iter(self._answered.values())) <= now:
            del self._answered[next(iter(self._answered))]
        if self._preparing:
            return math.inf
        return max(self._answered.values(), default=now)

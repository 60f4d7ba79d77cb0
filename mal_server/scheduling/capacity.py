"""Shares one quantity of a queue, its crops or its bytes, between priorities and callers. Pure; knows no queue.

Memory of calls follows one rule: the bytes are counted before they are allocated, and given back however the call ends.
Three kinds of it are bounded, each by the class that suits how long it is held:

    waiting and unread requests   `SharedCapacity`, in the batcher: a request that does not fit is refused at once
    images and masks in work      `MemoryLimiter`: held for milliseconds, so a task that does not fit waits
    results of evaluations        `MemoryQuota`: held for minutes to hours, so a call that does not fit is refused

INTERACTIVE may fill everything that BATCH does not hold, and BATCH counts for at most its part: so INTERACTIVE is never
refused because of BATCH. A caller holds at most its share of what its priority may fill, so that it cannot keep out the
other callers. A single request may exceed part and share if nothing of that priority, or of that caller, is there.
"""

from collections import Counter
from collections.abc import Hashable

from mal_server.scheduling.priority import Priority


class SharedCapacity:
    """One bounded quantity.

    >>> crops = SharedCapacity(100, batch_share=0.5, caller_share=0.5)
    >>> crops.take(50, Priority.BATCH, "job")
    >>> crops.excess(10, Priority.BATCH, "another job"), crops.excess(50, Priority.INTERACTIVE, "annotator")
    (10.0, 0.0)

    Args:
        limit: of everything together.
        batch_share: part of it that BATCH may fill, in (0, 1].
        caller_share: part that one caller may fill of what its priority may, in (0, 1].
    """

    def __init__(self, limit: float, *, batch_share: float = 1.0, caller_share: float = 1.0) -> None:
        self._limit = limit
        self._parts = {Priority.INTERACTIVE: limit, Priority.BATCH: limit * batch_share}
        self._caller_share = caller_share
        self._used = dict.fromkeys(Priority, 0)
        self._used_by_caller: Counter[tuple[Priority, Hashable]] = Counter()
        self._callers = dict.fromkeys(Priority, 0)

    @property
    def used(self) -> int:
        """The quantity held now."""
        return sum(self._used.values())

    def used_by(self, priority: Priority, caller: Hashable | None = None) -> int:
        """Returns the quantity that a priority holds, or one of its callers."""
        return self._used[priority] if caller is None else self._used_by_caller[priority, caller]

    def callers(self, priority: Priority) -> int:
        """Returns the number of callers of a priority that hold some."""
        return self._callers[priority]

    def excess(self, amount: int, priority: Priority, caller: Hashable) -> float:
        """Returns by how much a further amount exceeds a bound; 0 if it fits."""
        used, own, part = self._used[priority], self._used_by_caller[priority, caller], self._parts[priority]
        # Of BATCH, INTERACTIVE counts no more than its part; BATCH counts everything.
        others = sum(min(self._used[other], self._parts[other]) for other in Priority if other is not priority)
        bounds = ((own, part * self._caller_share), (used, part), (used + others, self._limit))
        return max([0.0, *(held + amount - bound for held, bound in bounds if held)])

    def take(self, amount: int, priority: Priority, caller: Hashable) -> None:
        """Counts an amount as held; it is for the caller of this method to ask `problem` first."""
        if not amount:
            return
        self._callers[priority] += not self._used_by_caller[priority, caller]
        self._used[priority] += amount
        self._used_by_caller[priority, caller] += amount

    def give_back(self, amount: int, priority: Priority, caller: Hashable) -> None:
        """Counts an amount as free again."""
        if not amount:
            return
        self._used[priority] -= amount
        self._used_by_caller[priority, caller] -= amount
        if not self._used_by_caller[priority, caller]:
            del self._used_by_caller[priority, caller]
            self._callers[priority] -= 1

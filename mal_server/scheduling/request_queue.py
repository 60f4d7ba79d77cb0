"""Orders queued items: INTERACTIVE first; BATCH items that have waited too long are guaranteed a quarter of the device.

An INTERACTIVE item goes ahead of every BATCH item, however long that one has waited. Each time it passes one that has
aged (waited `batch_aging_s` longer than itself), BATCH earns a third of an item of credit and spends it on going first.
So BATCH work never starves under constant INTERACTIVE load, and never delays it by more than its quarter.

Reads no clock and counts nothing beyond its own items: the batcher passes the time and starts batches.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Generic, NamedTuple, Protocol, TypeVar

from mal_server.scheduling.priority import Priority

INTERACTIVE_PER_BATCH = 3
"""INTERACTIVE items that pass aged BATCH items for each of those that goes first: a quarter of the device."""


class QueueClient(Protocol):
    """The request that items belong to; compared by identity."""

    @property
    def priority(self) -> Priority:
        """Priority of all its items."""

    @property
    def deadline(self) -> float:
        """Loop time from which its items are not worth running."""


C = TypeVar("C", bound=QueueClient)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class QueuedItem(Generic[C, T]):
    """One item: its request, its index among that request's items, and the loop time at which it was queued."""

    client: C
    index: int
    item: T
    arrival: float


class SortKey(NamedTuple):
    """Orders queues by their first items; the smallest goes first.

    Attributes:
        yields_to_interactive: a BATCH item without the credit to go ahead of INTERACTIVE ones.
        effective_arrival: arrival, `batch_aging_s` later for BATCH.
        arrival: decides between equal ones, as with infinite aging.
    """

    yields_to_interactive: bool
    effective_arrival: float
    arrival: float


class FairnessCredit:
    """Credit, in INTERACTIVE items, that aged BATCH items earn by being passed and spend on going first.

    Args:
        batch_size: items in a full batch; the credit never exceeds one such batch.
        is_first_come_first_served: BATCH needs no credit.
    """

    def __init__(self, batch_size: int, *, is_first_come_first_served: bool) -> None:
        self._limit = batch_size * INTERACTIVE_PER_BATCH
        self._credit = 0
        self._is_first_come_first_served = is_first_come_first_served

    def may_preempt(self, count: int, *, is_oldest: bool) -> bool:
        """Returns whether BATCH items may go ahead of INTERACTIVE ones that arrived after they had aged.

        Args:
            count: number of BATCH items.
            is_oldest: no other BATCH item has waited longer; only the oldest may use the credit.
        """
        if self._is_first_come_first_served:
            return True
        return is_oldest and self._credit >= count * INTERACTIVE_PER_BATCH

    def earn(self) -> None:
        """Records that an INTERACTIVE item passed an aged BATCH item."""
        self._credit = min(self._credit + 1, self._limit)

    def spend(self) -> None:
        """Records that the oldest BATCH item started, with or without passing anything."""
        self._credit = max(self._credit - INTERACTIVE_PER_BATCH, 0)


class RequestQueue(Generic[C, T]):
    """Items that may share a batch: by priority, first come first served within each.

    Args:
        batch_aging_s: time by which BATCH items count as having arrived later.
    """

    def __init__(self, batch_aging_s: float) -> None:
        self.size = 0
        """Queued items."""
        self._aging_s = {Priority.INTERACTIVE: 0.0, Priority.BATCH: batch_aging_s}
        self._requests: dict[Priority, OrderedDict[C, deque[QueuedItem[C, T]]]] = {p: OrderedDict() for p in Priority}

    def add(self, client: C, items: Iterable[T], now: float) -> None:
        """Appends all items of a request; a request adds its items once."""
        queued = deque(QueuedItem(client, index, item, now) for index, item in enumerate(items))
        if queued:
            self._requests[client.priority][client] = queued
            self.size += len(queued)

    def remove(self, client: C) -> tuple[int, ...]:
        """Removes what is left of a request; returns the indices of its items, none if nothing is."""
        items = self._requests[client.priority].pop(client, ())
        self.size -= len(items)
        return tuple(item.index for item in items)

    def expired(self, now: float) -> list[C]:
        """Returns the requests at the front whose deadline has passed; those behind are met when they go first."""
        fronts = (takewhile(lambda client: client.deadline <= now, clients) for clients in self._requests.values())
        return list(chain.from_iterable(fronts))

    def has(self, priority: Priority) -> bool:
        """Returns whether an item of this priority is queued."""
        return bool(self._requests[priority])

    def oldest_arrival(self) -> float:
        """Returns when the oldest item was queued; math.inf if the queue is empty."""
        return min(map(self._arrival, Priority))

    def effective_arrival(self, priority: Priority) -> float:
        """Returns the arrival of the oldest item of a priority, `batch_aging_s` later for BATCH; math.inf if none."""
        return self._arrival(priority) + self._aging_s[priority]

    def sort_key(self, credit: FairnessCredit, batch_size: int, other_batch_arrival: float) -> SortKey:
        """Returns the key of the item that goes first; the queue must not be empty.

        Args:
            credit: shared by all queues.
            batch_size: items in a full batch: going first means a whole batch.
            other_batch_arrival: least effective arrival of BATCH items in the other queues.
        """
        is_oldest = self.effective_arrival(Priority.BATCH) <= other_batch_arrival
        may_preempt = credit.may_preempt(min(batch_size, self.size), is_oldest=is_oldest)
        return min(
            SortKey(
                priority is Priority.BATCH and not may_preempt,
                self.effective_arrival(priority),
                self._arrival(priority),
            )
            for priority in Priority
            if self.has(priority)
        )

    def pop(self, credit: FairnessCredit, other_batch_arrival: float) -> QueuedItem[C, T]:
        """Removes and returns the item that goes first, and updates the credit; arguments as for `sort_key`."""
        requests = self._requests[self._next_priority(credit, other_batch_arrival)]
        client, items = next(iter(requests.items()))
        item = items.popleft()
        if not items:
            del requests[client]
        self.size -= 1
        return item

    def _next_priority(self, credit: FairnessCredit, other_batch_arrival: float) -> Priority:
        """Returns the priority of the next item to start, and updates the credit accordingly."""
        interactive, batch = map(self.effective_arrival, (Priority.INTERACTIVE, Priority.BATCH))
        is_oldest = batch <= other_batch_arrival
        if self.has(Priority.INTERACTIVE) and not (batch < interactive and credit.may_preempt(1, is_oldest=is_oldest)):
            if min(batch, other_batch_arrival) < interactive:
                credit.earn()
            return Priority.INTERACTIVE
        if is_oldest:
            credit.spend()
        return Priority.BATCH

    def _arrival(self, priority: Priority) -> float:
        oldest = next(iter(self._requests[priority].values()), None)
        return oldest[0].arrival if oldest else math.inf

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
from itertools import takewhile
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar

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
        """Loop time from which its items must not start."""


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
        self._batch_aging_s = batch_aging_s
        self._interactive: _Requests[C, T] = OrderedDict()
        self._batch: _Requests[C, T] = OrderedDict()

    def add(self, client: C, items: Iterable[T], now: float) -> None:
        """Appends all items of a request; a request adds its items once."""
        queued = deque(QueuedItem(client, index, item, now) for index, item in enumerate(items))
        if queued:
            self._requests(client.priority)[client] = queued
            self.size += len(queued)

    def remove(self, client: C) -> tuple[int, ...]:
        """Removes the items of a request that are still queued; returns their indices."""
        items = self._requests(client.priority).pop(client, ())
        self.size -= len(items)
        return tuple(item.index for item in items)

    def expired(self, now: float) -> list[C]:
        """Returns the requests at the front of each priority whose deadline has passed."""
        return [
            client
            for requests in (self._interactive, self._batch)
            for client in takewhile(lambda client: client.deadline <= now, requests)
        ]

    @property
    def has_interactive(self) -> bool:
        """True if an INTERACTIVE item is queued."""
        return bool(self._interactive)

    def oldest_arrival(self) -> float:
        """Returns when the oldest item was queued; math.inf if the queue is empty."""
        return min(_first_arrival(self._interactive), _first_arrival(self._batch))

    def batch_arrival(self) -> float:
        """Returns the effective arrival of the oldest BATCH item; math.inf if there is none."""
        return _first_arrival(self._batch) + self._batch_aging_s

    def sort_key(self, credit: FairnessCredit, batch_size: int, other_batch_arrival: float) -> SortKey:
        """Returns the key of the item that goes first; the queue must not be empty.

        Args:
            credit: shared by all queues.
            batch_size: items in a full batch: going first means a whole batch.
            other_batch_arrival: `batch_arrival` of the other queues, the least one.
        """
        keys = []
        if self._interactive:
            arrival = _first_arrival(self._interactive)
            keys.append(SortKey(yields_to_interactive=False, effective_arrival=arrival, arrival=arrival))
        if self._batch:
            effective = self.batch_arrival()
            may_preempt = credit.may_preempt(min(batch_size, self.size), is_oldest=effective <= other_batch_arrival)
            keys.append(SortKey(not may_preempt, effective, _first_arrival(self._batch)))
        return min(keys)

    def pop(self, credit: FairnessCredit, other_batch_arrival: float) -> QueuedItem[C, T]:
        """Removes and returns the item that goes first, and updates the credit; arguments as for `sort_key`."""
        requests = self._next_requests(credit, other_batch_arrival)
        client, items = next(iter(requests.items()))
        item = items.popleft()
        if not items:
            del requests[client]
        self.size -= 1
        return item

    def _next_requests(self, credit: FairnessCredit, other_batch_arrival: float) -> "_Requests[C, T]":
        """Returns the requests of the priority whose turn it is, and updates the credit."""
        interactive, batch = _first_arrival(self._interactive), self.batch_arrival()
        is_oldest = batch <= other_batch_arrival
        batch_first = batch < interactive and credit.may_preempt(1, is_oldest=is_oldest)
        if self._interactive and not batch_first:
            if min(batch, other_batch_arrival) < interactive:
                credit.earn()
            return self._interactive
        if is_oldest:
            credit.spend()
        return self._batch

    def _requests(self, priority: Priority) -> "_Requests[C, T]":
        return self._interactive if priority is Priority.INTERACTIVE else self._batch


_Requests: TypeAlias = OrderedDict[C, deque[QueuedItem[C, T]]]
"""Queued items by request, oldest request first. No request is empty."""


def _first_arrival(requests: "_Requests[C, T]") -> float:
    for items in requests.values():
        return items[0].arrival
    return math.inf

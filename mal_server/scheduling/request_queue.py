"""Orders the items of one batch key: INTERACTIVE first, with a quarter of the device guaranteed to aged BATCH items.

The order within a priority is first come, first served. A BATCH item is aged relative to an INTERACTIVE item that
arrived more than `batch_aging_s` after it. INTERACTIVE items still go ahead of aged ones, but three of them earn the
credit for one BATCH item to go ahead. So BATCH items never starve, and take at most a quarter of the device while
INTERACTIVE items wait.

For example, if `batch_aging_s` is 10, a BATCH item queued at 0 s and INTERACTIVE items queued at 11, 12, 13 and 14 s
run in the order 11, 12, 13, 0, 14.

Reads no clock and counts its own items only: the batcher passes the time and starts batches.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from mal_server.scheduling.priority import Priority

INTERACTIVE_PER_BATCH = 3
"""Number of INTERACTIVE items that pay for one aged BATCH item; 3 to 1 guarantees BATCH a quarter of the device."""


class QueueClient(Protocol):
    """Request that items belong to; compared by identity."""

    @property
    def priority(self) -> Priority:
        """Priority of all items."""

    @property
    def deadline(self) -> float:
        """Loop time after which no item may start."""


Client = TypeVar("Client", bound=QueueClient)
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class QueuedItem(Generic[Client, Item]):
    """Item in a queue.

    Attributes:
        client: request of the item.
        index: index of the item among those of its request.
        item: the item itself.
        arrival: loop time at which it was queued.
    """

    client: Client
    index: int
    item: Item
    arrival: float


_Requests: TypeAlias = OrderedDict[Client, deque[QueuedItem[Client, Item]]]
"""Queued items by request, oldest request first. No request is empty."""


class SortKey(NamedTuple):
    """Orders queues by their first items; the smallest goes first.

    Attributes:
        yields_to_interactive: True for a BATCH item that lacks the credit to go ahead of INTERACTIVE items.
        effective_arrival: arrival, plus `batch_aging_s` for BATCH items.
        arrival: breaks ties, for example when `batch_aging_s` is infinite.
    """

    yields_to_interactive: bool
    effective_arrival: float
    arrival: float


class FairnessCredit:
    """Credit that lets aged BATCH items go ahead of INTERACTIVE items; shared by the queues of all keys.

    One unit is earned for each INTERACTIVE item that goes ahead of an aged BATCH item; a BATCH item costs
    `INTERACTIVE_PER_BATCH` units.

    Args:
        batch_size: number of items in a full batch; the credit is limited to the cost of one.
        is_first_come_first_served: if True, aged BATCH items need no credit.
    """

    def __init__(self, batch_size: int, *, is_first_come_first_served: bool) -> None:
        self._limit = batch_size * INTERACTIVE_PER_BATCH
        self._credit = 0
        self._is_first_come_first_served = is_first_come_first_served

    def may_preempt(self, count: int, *, is_oldest: bool) -> bool:
        """Returns True if aged BATCH items may go ahead of INTERACTIVE items.

        Args:
            count: number of BATCH items.
            is_oldest: True if no BATCH item of another key is older; only the oldest may use the credit.
        """
        if self._is_first_come_first_served:
            return True
        return is_oldest and self._credit >= count * INTERACTIVE_PER_BATCH

    def earn(self) -> None:
        """Records that an INTERACTIVE item went ahead of an aged BATCH item."""
        self._credit = min(self._credit + 1, self._limit)

    def spend(self) -> None:
        """Records that the oldest BATCH item started, even if no INTERACTIVE item was waiting."""
        self._credit = max(self._credit - INTERACTIVE_PER_BATCH, 0)


class RequestQueue(Generic[Client, Item]):
    """Items that may share a batch, in the order described above.

    Args:
        batch_aging_s: seconds added to the arrival of a BATCH item when it is compared with INTERACTIVE items.
    """

    def __init__(self, batch_aging_s: float) -> None:
        self.size = 0
        """Number of queued items."""
        self._batch_aging_s = batch_aging_s
        self._interactive: _Requests[Client, Item] = OrderedDict()
        self._batch: _Requests[Client, Item] = OrderedDict()

    def add(self, client: Client, items: Iterable[Item], now: float) -> None:
        """Appends the items of a request; called once for each request."""
        queued = deque(QueuedItem(client, index, item, now) for index, item in enumerate(items))
        if queued:
            self._requests(client.priority)[client] = queued
            self.size += len(queued)

    def remove(self, client: Client) -> tuple[int, ...]:
        """Removes the items of a request that are still queued and returns their indices."""
        items = self._requests(client.priority).pop(client, ())
        self.size -= len(items)
        return tuple(item.index for item in items)

    def expired(self, now: float) -> list[Client]:
        """Returns the expired requests at the front of each priority.

        Expired requests further back are returned when they reach the front, before any of their items starts.
        """
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
        """Returns the sort key of the item that goes first; the queue must not be empty.

        Args:
            credit: credit shared by the queues of all keys.
            batch_size: number of items in a full batch. A BATCH item goes ahead of other keys only with credit for all
                items that its batch may hold, since all of them delay the other keys.
            other_batch_arrival: earliest `batch_arrival` of the other keys.
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

    def pop(self, credit: FairnessCredit, other_batch_arrival: float) -> QueuedItem[Client, Item]:
        """Removes and returns the item that goes first, and updates the credit; the queue must not be empty.

        Args:
            credit: credit shared by the queues of all keys.
            other_batch_arrival: earliest `batch_arrival` of the other keys.
        """
        interactive, batch = _first_arrival(self._interactive), self.batch_arrival()
        is_oldest = batch <= other_batch_arrival
        is_aged = batch < interactive
        if not self._interactive or (is_aged and credit.may_preempt(1, is_oldest=is_oldest)):
            if is_oldest:
                credit.spend()
            return self._pop_first(self._batch)
        if is_aged or other_batch_arrival < interactive:
            credit.earn()
        return self._pop_first(self._interactive)

    def _pop_first(self, requests: _Requests[Client, Item]) -> QueuedItem[Client, Item]:
        client, items = next(iter(requests.items()))
        item = items.popleft()
        if not items:
            del requests[client]
        self.size -= 1
        return item

    def _requests(self, priority: Priority) -> _Requests[Client, Item]:
        return self._interactive if priority is Priority.INTERACTIVE else self._batch


def _first_arrival(requests: _Requests[Client, Item]) -> float:
    for items in requests.values():
        return items[0].arrival
    return math.inf

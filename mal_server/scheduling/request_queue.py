"""The order of what waits for a batch: people first, and bulk work that is passed too long is owed a part.

INTERACTIVE items go ahead, whatever else waits. Only where they alone would keep the device busy, BATCH items that
waited `patience_s` longer than they get a quarter of it (`FairnessCredit`): bulk work never starves, and a long queue
of it never keeps people waiting. Told the time; asks no clock, and starts nothing.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from mal_server.scheduling.priority import Priority

INTERACTIVE_PER_BATCH = 3
"""INTERACTIVE items that pass BATCH ones which waited their patience, for each of these that goes: a quarter."""


class QueueClient(Protocol):
    """Who brought items."""

    @property
    def waiting(self) -> int:
        """Items that are not yet running; 0 when nobody waits for them any more."""

    @property
    def deadline(self) -> float:
        """Loop time after which nobody waits for them."""

    def expire(self) -> None:
        """Ends what still waits, since the deadline has passed."""

    def leave(self, count: int) -> None:
        """So many of its items wait no more."""


C = TypeVar("C", bound=QueueClient)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class QueuedItem(Generic[C, T]):
    """An item that waits: whose, its place among theirs, and since which loop time."""

    ticket: C
    index: int
    item: T
    since: float


class FairnessCredit:
    """What is owed to BATCH items that waited their patience and were passed by INTERACTIVE ones all the same.

    Args:
        batch_size: items of a full batch; no more than that is ever owed.
        is_first_come_first_served: nothing is ever passed.
    """

    def __init__(self, batch_size: int, *, is_first_come_first_served: bool) -> None:
        self._most = batch_size * INTERACTIVE_PER_BATCH
        self._passed = 0
        self._is_free = is_first_come_first_served

    def allows(self, count: int, *, is_oldest: bool) -> bool:
        """Whether so many may go ahead of INTERACTIVE items that came later.

        Args:
            count: BATCH items.
            is_oldest: no others wait longer; what is owed is owed to those.
        """
        return self._is_free or (is_oldest and self._passed >= count * INTERACTIVE_PER_BATCH)

    def passed(self) -> None:
        """An INTERACTIVE item went ahead of a BATCH item whose turn it was."""
        self._passed = min(self._passed + 1, self._most)

    def ran(self) -> None:
        """The BATCH item that waited longest went, whatever it went ahead of."""
        self._passed = max(self._passed - INTERACTIVE_PER_BATCH, 0)


class RequestQueue(Generic[C, T]):
    """Items of one key by priority, oldest first. Those that nobody waits for stay until met, and count as nothing."""

    def __init__(self, patience_s: float) -> None:
        self.queues: dict[Priority, deque[QueuedItem[C, T]]] = {priority: deque() for priority in Priority}
        self.live = 0
        self._patience_s = patience_s

    def clean(self, now: float) -> None:
        """Removes what nobody waits for from the front; ends tickets whose deadline has passed."""
        for queue in self.queues.values():
            while queue:
                ticket = queue[0].ticket
                if ticket.waiting and ticket.deadline <= now:
                    ticket.expire()
                if ticket.waiting:
                    break
                queue.popleft()

    def since(self) -> float:
        """Since when the first item waits; after `clean`, and only with live items."""
        return min(queue[0].since for queue in self.queues.values() if queue)

    def bulk_rank(self) -> float:
        """From when on the first BATCH item goes ahead of what is submitted then; after `clean`."""
        queue = self.queues[Priority.BATCH]
        return queue[0].since + self._patience_s if queue else math.inf

    def people_rank(self) -> float:
        """Since when the first INTERACTIVE item waits; after `clean`."""
        queue = self.queues[Priority.INTERACTIVE]
        return queue[0].since if queue else math.inf

    def rank(self, debt: FairnessCredit, batch_size: int, others_bulk_rank: float) -> tuple[bool, float, float]:
        """Lower goes first; after `clean`, and only with live items.

        BATCH items that may not go ahead of people come behind all of these, in their own order.
        """
        people, bulk = self.queues[Priority.INTERACTIVE], self.queues[Priority.BATCH]
        heads: list[tuple[bool, float, float]] = []
        if people:
            heads.append((False, people[0].since, people[0].since))
        if bulk:
            bulk_rank = self.bulk_rank()
            may_pass = debt.allows(min(batch_size, self.live), is_oldest=bulk_rank <= others_bulk_rank)
            heads.append((not may_pass, bulk_rank, bulk[0].since))
        return min(heads)

    def take(self, count: int, now: float, debt: FairnessCredit, others_bulk_rank: float) -> list[QueuedItem[C, T]]:
        """Removes and returns the first `count` live items, and counts who passed whom, in other lanes too.

        Args:
            count: at most so many.
            now: loop time.
            debt: of all lanes.
            others_bulk_rank: the least `bulk_rank` of the other lanes.
        """
        taken: list[QueuedItem[C, T]] = []
        while self.live and len(taken) < count:
            self.clean(now)
            people, bulk = self.queues[Priority.INTERACTIVE], self.queues[Priority.BATCH]
            people_rank, bulk_rank = self.people_rank(), self.bulk_rank()
            is_oldest = bulk_rank <= others_bulk_rank
            if bulk and (not people or (bulk_rank < people_rank and debt.allows(1, is_oldest=is_oldest))):
                entry = bulk.popleft()
                if is_oldest:
                    debt.ran()
            elif not people:
                break
            else:
                entry = people.popleft()
                if min(bulk_rank, others_bulk_rank) < people_rank:
                    debt.passed()
            entry.ticket.leave(1)
            taken.append(entry)
        return taken

"""Orders the items of one batch key: INTERACTIVE first, with a quarter of the device guaranteed to aged BATCH items.

Within a priority the callers take turns: each in turn gets one item, from the oldest of its requests (round robin). So
the next item of a caller waits for at most one item of each other caller, however much they have queued.

A BATCH item is aged relative to an INTERACTIVE item that arrived more than `batch_aging_s` after it. The oldest BATCH
item speaks for all: while it is aged, INTERACTIVE items still go ahead of BATCH, but three of them earn the credit for
one BATCH item to go ahead. So BATCH items never starve, and take at most a quarter of the device while INTERACTIVE
items wait.

For example, if `batch_aging_s` is 10, a BATCH item queued at 0 s and INTERACTIVE items queued at 11, 12, 13 and 14 s
run in the order 11, 12, 13, 0, 14.

Reads no clock and counts its own items only: the batcher passes the time and starts batches.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from mal_server.scheduling.priority import Priority

INTERACTIVE_PER_BATCH = 3
"""Number of INTERACTIVE items that pay for one aged BATCH item; 3 to 1 guarantees BATCH a quarter of the device."""


class QueueClient(Protocol):
    """Request that items belong to; compared by identity."""

    @property
    def caller(self) -> Hashable:
        """Caller that sent it."""

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


class Turn(NamedTuple):
    """Place of a caller in the round robin of its priority, over all keys; the smallest goes first.

    Attributes:
        number: larger than that of every turn given before it; math.inf if nobody waits.
        arrival: when the caller's oldest request was queued; breaks ties between the keys of one caller.
    """

    number: float
    arrival: float


NO_TURN = Turn(math.inf, math.inf)


class Heads(NamedTuple):
    """First items of a queue, or of several queues together; math.inf and NO_TURN stand for none.

    Attributes:
        interactive: turn of the INTERACTIVE item that goes first.
        batch: turn of the BATCH item that goes first.
        batch_arrival: arrival of the oldest BATCH item, plus `batch_aging_s`.
    """

    interactive: Turn
    batch: Turn
    batch_arrival: float


NO_HEADS = Heads(NO_TURN, NO_TURN, math.inf)


def first_of(heads: Iterable[Heads]) -> Heads:
    """Returns the first items of several queues together.

    >>> first_of([NO_HEADS, Heads(Turn(4, 0.0), NO_TURN, math.inf)]).interactive
    Turn(number=4, arrival=0.0)
    """
    columns = tuple(zip(NO_HEADS, *heads, strict=True))
    return Heads(min(columns[0]), min(columns[1]), min(columns[2]))


class SortKey(NamedTuple):
    """Orders queues by their first items; the smallest goes first.

    Attributes:
        yields_to_interactive: True for a BATCH item that lacks the credit to go ahead of INTERACTIVE items.
        effective_arrival: arrival of the item that speaks for the priority in all queues, plus `batch_aging_s` for
            BATCH. It decides between the priorities.
        turn: decides between queues within a priority.
    """

    yields_to_interactive: bool
    effective_arrival: float
    turn: Turn


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

    def may_preempt(self, count: int, *, is_next: bool) -> bool:
        """Returns True if aged BATCH items may go ahead of INTERACTIVE items.

        Args:
            count: number of BATCH items.
            is_next: True if it is the turn of no BATCH item of another key; only the next one may use the credit.
        """
        if self._is_first_come_first_served:
            return True
        return is_next and self._credit >= count * INTERACTIVE_PER_BATCH

    def earn(self) -> None:
        """Records that an INTERACTIVE item went ahead of an aged BATCH item."""
        self._credit = min(self._credit + 1, self._limit)

    def spend(self) -> None:
        """Records that the BATCH item whose turn it was started, even if no INTERACTIVE item was waiting."""
        self._credit = max(self._credit - INTERACTIVE_PER_BATCH, 0)


class _Line(Generic[Client, Item]):
    """Requests of one caller, oldest first, and its turn."""

    def __init__(self, turn: int) -> None:
        self.turn = turn
        self.requests: OrderedDict[Client, deque[QueuedItem[Client, Item]]] = OrderedDict()

    @property
    def first(self) -> deque[QueuedItem[Client, Item]]:
        """Queued items of the oldest request."""
        return next(iter(self.requests.values()))


class _Turns(Generic[Client, Item]):
    """Items of one priority of one key, in lines of callers. Every method takes the same time however many wait."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, _Line[Client, Item]] = OrderedDict()
        """Line of each caller with queued items, the one whose turn it is first."""
        self._arrivals: OrderedDict[Client, float] = OrderedDict()
        """Arrival of each request with queued items, oldest first."""

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, client: Client, items: deque[QueuedItem[Client, Item]], turn: int) -> None:
        """Appends a request; a caller without a line gets one at the end, with this turn."""
        self._lines.setdefault(client.caller, _Line(turn)).requests[client] = items
        self._arrivals[client] = items[0].arrival

    def remove(self, client: Client) -> deque[QueuedItem[Client, Item]]:
        """Removes a request and returns its queued items."""
        line = self._lines.get(client.caller)
        items = deque[QueuedItem[Client, Item]]() if line is None else line.requests.pop(client, deque())
        if line is not None and not line.requests:
            del self._lines[client.caller]
        self._arrivals.pop(client, None)
        return items

    def first(self) -> QueuedItem[Client, Item] | None:
        """Returns the item whose turn it is."""
        return next((line.first[0] for line in self._lines.values()), None)

    def pop(self) -> QueuedItem[Client, Item]:
        """Removes and returns the item whose turn it is; it must not be empty."""
        items = next(iter(self._lines.values())).first
        item = items.popleft()
        if not items:
            self.remove(item.client)
        return item

    def end_turn(self, caller: Hashable, turn: int) -> None:
        """Moves a caller to the end of the round robin."""
        line = self._lines.get(caller)
        if line is not None:
            line.turn = turn
            self._lines.move_to_end(caller)

    def turn(self) -> Turn:
        """Returns the turn of the first item; NO_TURN if there is none."""
        return next((Turn(line.turn, line.first[0].arrival) for line in self._lines.values()), NO_TURN)

    def oldest_arrival(self) -> float:
        """Returns when the oldest item was queued; math.inf if there is none."""
        return next(iter(self._arrivals.values()), math.inf)


class RequestQueue(Generic[Client, Item]):
    """Items that may share a batch, in the order described above.

    Args:
        batch_aging_s: seconds added to the arrival of a BATCH item when it is compared with INTERACTIVE items.
    """

    def __init__(self, batch_aging_s: float) -> None:
        self.size = 0
        """Number of queued items."""
        self._batch_aging_s = batch_aging_s
        self._turns: dict[Priority, _Turns[Client, Item]] = {priority: _Turns() for priority in Priority}

    def add(self, client: Client, items: Iterable[Item], now: float, turn: int = 0) -> None:
        """Appends the items of a request; called once for each request.

        Args:
            client: request of the items.
            items: items in order.
            now: loop time.
            turn: larger than all turns so far; the first turn of a caller that has nothing queued.
        """
        queued = deque(QueuedItem(client, index, item, now) for index, item in enumerate(items))
        if queued:
            self._turns[client.priority].add(client, queued, turn)
            self.size += len(queued)

    def remove(self, client: Client) -> tuple[int, ...]:
        """Removes the items of a request that are still queued and returns their indices."""
        items = self._turns[client.priority].remove(client)
        self.size -= len(items)
        return tuple(item.index for item in items)

    def expired(self, now: float) -> list[Client]:
        """Returns the requests whose turn it is in their priority and whose deadline has passed.

        Remove them and ask again: an expired request further back is returned when it would be its turn.
        """
        first = (turns.first() for turns in self._turns.values())
        return [item.client for item in first if item is not None and item.client.deadline <= now]

    @property
    def has_interactive(self) -> bool:
        """True if an INTERACTIVE item is queued."""
        return bool(self._turns[Priority.INTERACTIVE])

    def oldest_arrival(self) -> float:
        """Returns when the oldest item was queued; math.inf if the queue is empty."""
        return min(turns.oldest_arrival() for turns in self._turns.values())

    def heads(self) -> Heads:
        """Returns the first items of both priorities."""
        batch = self._turns[Priority.BATCH]
        return Heads(
            self._turns[Priority.INTERACTIVE].turn(), batch.turn(), batch.oldest_arrival() + self._batch_aging_s
        )

    def sort_key(self, credit: FairnessCredit, batch_size: int, others: Heads) -> SortKey:
        """Returns the sort key of the item that goes first; the queue must not be empty.

        Args:
            credit: credit shared by the queues of all keys.
            batch_size: number of items in a full batch. A BATCH item goes ahead of other keys only with credit for all
                items that its batch may hold, since all of them delay the other keys.
            others: first items of the other keys.
        """
        own = self.heads()
        keys = []
        if own.interactive is not NO_TURN:
            keys.append(SortKey(False, min(own.interactive, others.interactive).arrival, own.interactive))
        if own.batch is not NO_TURN:
            may_preempt = credit.may_preempt(min(batch_size, self.size), is_next=own.batch <= others.batch)
            keys.append(SortKey(not may_preempt, min(own.batch_arrival, others.batch_arrival), own.batch))
        return min(keys)

    def pop(self, credit: FairnessCredit, others: Heads) -> QueuedItem[Client, Item]:
        """Removes and returns the item that goes first, and updates the credit; the queue must not be empty.

        The batcher then ends the turn of its caller (`end_turn`) in the queues of all keys.

        Args:
            credit: credit shared by the queues of all keys.
            others: first items of the other keys.
        """
        own = self.heads()
        is_next = own.batch <= others.batch
        is_aged = min(own.batch_arrival, others.batch_arrival) < own.interactive.arrival
        has_batch = own.batch is not NO_TURN
        if own.interactive is NO_TURN or (has_batch and is_aged and credit.may_preempt(1, is_next=is_next)):
            if is_next:
                credit.spend()
            return self._pop_first(Priority.BATCH)
        if is_aged:
            credit.earn()
        return self._pop_first(Priority.INTERACTIVE)

    def end_turn(self, client: Client, turn: int) -> None:
        """Moves the caller of a request to the end of the round robin of its priority."""
        self._turns[client.priority].end_turn(client.caller, turn)

    def _pop_first(self, priority: Priority) -> QueuedItem[Client, Item]:
        self.size -= 1
        return self._turns[priority].pop()

"""Groups the work of many requests into batches for few runners. Pure asyncio; knows nothing of images, models or gRPC.

A request takes a `Ticket` for its number of items before it spends anything on them (or is refused: `Overloaded`),
submits the items under a key, and receives one `Share` for each finished batch that held some of them. Items share a
batch exactly when their keys are equal. A runner that is busy lets batches fill by themselves; an idle one waits at
most `max_delay_s` for company.

    ticket = batcher.admit(2)  →  ticket.submit(key, [a, b])  →  lane of that key  →  runner  →  Share, Share, …

A closed ticket (its caller was cancelled, or left) is skipped when batches are formed. Nothing that a caller does, and
no error of a runner, stops the others: shares go into a queue of the ticket's own, read or not.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
R = TypeVar("R")

Runner = Callable[[K, Sequence[T]], Awaitable[Sequence[R | Exception]]]
"""Runs one batch; gives a result or an error for each item, in order. What it raises counts for every item."""

MIN_RETRY_S = 0.05
MAX_RETRY_S = 60.0
FIRST_RETRY_S = 1.0
"""Said to refused callers before any batch was measured."""

RATE_WEIGHT = 0.2
"""Weight of the newest batch in the running mean of items per second."""

TIMER_SLACK_S = 1e-4
"""Event loops may call a timer a little early; a batch that is due this soon is due."""


class Overloaded(Exception):
    """Too much is waiting; after `retry_after_s` there should be room, by the measured speed."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Share(Generic[R]):
    """One request's part of one finished batch.

    Attributes:
        indices: places of the outcomes among the submitted items.
        outcomes: a result, or the error of that item.
        queue_s: longest wait of these items before the batch started.
        run_s: time of the whole batch.
        batch_size: items in the whole batch, other requests' included.
    """

    indices: tuple[int, ...]
    outcomes: tuple[R | Exception, ...]
    queue_s: float
    run_s: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class _Entry(Generic[K, T, R]):
    ticket: "Ticket[K, T, R]"
    index: int
    item: T
    since: float


class _Lane(Generic[K, T, R]):
    """Items of one key, oldest first. Those of closed tickets stay until they are met, and count as nothing."""

    def __init__(self) -> None:
        self.entries: deque[_Entry[K, T, R]] = deque()
        self.live = 0

    def oldest(self) -> float | None:
        """Since when the first live item waits; None without one."""
        while self.entries and not self.entries[0].ticket.is_open:
            self.entries.popleft()
        return self.entries[0].since if self.entries else None

    def take(self, count: int) -> list[_Entry[K, T, R]]:
        """Removes and returns the first `count` live items."""
        taken: list[_Entry[K, T, R]] = []
        while self.entries and len(taken) < count:
            entry = self.entries.popleft()
            if entry.ticket.is_open:
                taken.append(entry)
        self.live -= len(taken)
        return taken


class Ticket(Generic[K, T, R]):
    """One request's room for `waiting` items; a context manager that gives back on leaving what is still held."""

    def __init__(self, batcher: "Batcher[K, T, R]", waiting: int) -> None:
        self._batcher = batcher
        self._shares: asyncio.Queue[Share[R]] = asyncio.Queue()
        self.waiting = waiting
        self.is_open = True
        self.lane: _Lane[K, T, R] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batcher.close(self)

    async def submit(self, key: K, items: Sequence[T]) -> AsyncGenerator[Share[R], None]:
        """Runs the items, at most as many as were admitted, and yields shares as their batches finish; works once."""
        self._batcher.enqueue(self, key, items)
        left = len(items)
        while left:
            share = await self._shares.get()
            left -= len(share.indices)
            yield share

    def deliver(self, share: Share[R]) -> None:
        """Takes a finished share; harmless when nobody waits for it any more."""
        if self.is_open:
            self._shares.put_nowait(share)


class Batcher(Generic[K, T, R]):
    """See the module. To be used from one event loop.

    Args:
        runners: each runs one batch at a time.
        max_batch_size: items in a batch.
        max_delay_s: longest wait for company while a runner is idle.
        max_waiting: items that are admitted and not yet running.
    """

    def __init__(
        self, runners: Sequence["Runner[K, T, R]"], *, max_batch_size: int, max_delay_s: float, max_waiting: int
    ) -> None:
        self._idle = list(runners)
        self._runner_count = len(runners)
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._max_waiting = max_waiting
        self._lanes: dict[K, _Lane[K, T, R]] = {}
        self._waiting = 0
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._items_per_s: float | None = None

    @property
    def waiting(self) -> int:
        """Items that are admitted and not yet running."""
        return self._waiting

    def admit(self, count: int) -> Ticket[K, T, R]:
        """Room for `count` items; raises Overloaded when there is none."""
        if self._waiting + count > self._max_waiting:
            raise Overloaded(
                f"{self._waiting} boxes wait for the device and {count} more would pass the limit of "
                f"{self._max_waiting}",
                self._retry_after_s(count),
            )
        self._waiting += count
        return Ticket(self, count)

    def enqueue(self, ticket: Ticket[K, T, R], key: K, items: Sequence[T]) -> None:
        """Puts a ticket's items into their lane and gives back the room that it held beyond them."""
        if ticket.lane is not None or len(items) > ticket.waiting:
            raise ValueError(f"a ticket for {ticket.waiting} items takes at most so many, once; got {len(items)}")
        self._waiting -= ticket.waiting - len(items)
        ticket.waiting = len(items)
        if not items:
            return
        lane = ticket.lane = self._lanes.setdefault(key, _Lane())
        now = asyncio.get_running_loop().time()
        lane.entries.extend(_Entry(ticket, index, item, now) for index, item in enumerate(items))
        lane.live += len(items)
        self._pump()

    def close(self, ticket: Ticket[K, T, R]) -> None:
        """Forgets what the ticket still holds; its items that run already finish and are thrown away."""
        if not ticket.is_open:
            return
        ticket.is_open = False
        self._waiting -= ticket.waiting
        if ticket.lane is not None:
            ticket.lane.live -= ticket.waiting
        ticket.waiting = 0

    async def idle(self) -> None:
        """Returns when no batch is running."""
        while self._running:
            await asyncio.wait(self._running)

    def _pump(self) -> None:
        """Starts every batch that is due on the runners that are idle, and wakes up when the next one will be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._idle:
            due_at, key = self._next_lane()
            if key is None:
                return
            if due_at > loop.time() + TIMER_SLACK_S:
                self._timer = loop.call_at(due_at, self._pump)
                return
            entries = self._lanes[key].take(self._max_batch_size)
            for entry in entries:
                entry.ticket.waiting -= 1
            self._waiting -= len(entries)
            task = loop.create_task(self._run(self._idle.pop(), key, entries))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def _next_lane(self) -> tuple[float, K | None]:
        """When the next batch is due, and its key: a full lane at once, others when their oldest item has waited."""
        best_due, best_since, best = 0.0, 0.0, None
        for key, lane in list(self._lanes.items()):
            since = lane.oldest()
            if since is None:
                del self._lanes[key]
                continue
            due = since if lane.live >= self._max_batch_size else since + self._max_delay_s
            if best is None or (due, since) < (best_due, best_since):
                best_due, best_since, best = due, since, key
        return best_due, best

    async def _run(self, runner: "Runner[K, T, R]", key: K, entries: list[_Entry[K, T, R]]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            outcomes = await runner(key, [entry.item for entry in entries])
            if len(outcomes) != len(entries):
                raise RuntimeError(f"a runner gave {len(outcomes)} results for {len(entries)} items")
            self._measure(len(entries), loop.time() - started)
        # Whatever a runner raises belongs to this batch alone: its callers get it, and the next batch runs.
        except Exception as error:
            outcomes = [error] * len(entries)
        took = loop.time() - started
        shares: dict[Ticket[K, T, R], list[tuple[_Entry[K, T, R], R | Exception]]] = {}
        for entry, outcome in zip(entries, outcomes, strict=True):
            shares.setdefault(entry.ticket, []).append((entry, outcome))
        for ticket, pairs in shares.items():
            ticket.deliver(
                Share(
                    indices=tuple(entry.index for entry, _ in pairs),
                    outcomes=tuple(outcome for _, outcome in pairs),
                    queue_s=started - min(entry.since for entry, _ in pairs),
                    run_s=took,
                    batch_size=len(entries),
                )
            )
        self._idle.append(runner)
        self._pump()

    def _measure(self, count: int, took_s: float) -> None:
        rate = count / max(took_s, 1e-6)
        if self._items_per_s is None:
            self._items_per_s = rate
        else:
            self._items_per_s += RATE_WEIGHT * (rate - self._items_per_s)

    def _retry_after_s(self, count: int) -> float:
        """Time to work off what is too many, or half of what waits, whichever is more."""
        if self._items_per_s is None:
            return FIRST_RETRY_S
        excess = max(self._waiting + count - self._max_waiting, self._waiting / 2)
        return min(max(excess / (self._items_per_s * self._runner_count), MIN_RETRY_S), MAX_RETRY_S)

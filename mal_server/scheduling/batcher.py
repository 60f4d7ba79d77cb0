"""Groups the work of many requests into batches for few runners. Pure asyncio; knows nothing of images, models or gRPC.

A request takes an `Admission` for its number of items before it spends anything on them (or is refused: `QueueFull`),
submits the items under a key, and receives one `BatchSlice` for each finished batch that held some of them. Items share
a batch exactly when their keys are equal. A runner that is busy lets batches fill by themselves; an idle one waits for
company only while some may come (`company`), and at most `max_delay_s`: a lone caller does not wait at all.

    ticket = batcher.admit(2)  →  ticket.submit(key, [a, b])  →  lane of that key  →  runner  →  Share, Share, …

Who goes first is decided in `lanes`: INTERACTIVE items go into the very next batch, BATCH ones never starve. What is
too much is refused with the time to come back, by the speed so far (`pace`).

A closed ticket (its caller was cancelled, or left) is skipped when batches are formed, and so is one whose deadline has
passed. Nothing that a caller does, and no error of a runner, stops the others: shares go into a queue of the ticket's
own, read or not.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from mal_server.scheduling.batch_delayer import BatchDelayer
from mal_server.scheduling.priority import Priority
from mal_server.scheduling.request_queue import FairnessCredit, QueuedItem, RequestQueue
from mal_server.scheduling.throughput import Throughput

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
R = TypeVar("R")

Runner = Callable[[K, Sequence[T]], Awaitable[Sequence[R | Exception]]]
"""Runs one batch; gives a result or an error for each item, in order. What it raises counts for every item."""

TIMER_SLACK_S = 1e-4
"""Event loops may call a timer a little early; a batch that is due this soon is due."""


class QueueFull(Exception):
    """Too much is waiting; after `retry_after_s` there should be room, by the measured speed."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """The caller's deadline has passed, so the work was not begun or not finished."""


class BatchObserver(Protocol):
    """Is told what happens."""

    def batch_ended(self, size: int, took_s: float) -> None:
        """A batch of `size` items ran."""

    def waited(self, priority: str, seconds: float) -> None:
        """The longest wait of a request's items in one batch."""

    def dropped(self, reason: str, crops: int) -> None:
        """Items that nobody waits for any more: the cause (cancelled, deadline) and where they were.

        At the entry, in the queue, on the device (they ran for nothing), or before the encoding of their results.
        """


class NullObserver:
    """An observer that looks away."""

    def batch_ended(self, size: int, took_s: float) -> None:
        """Nothing."""

    def waited(self, priority: str, seconds: float) -> None:
        """Nothing."""

    def dropped(self, reason: str, crops: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class BatchSlice(Generic[R]):
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


class Admission(Generic[K, T, R]):
    """One request's room for `waiting` items; a context manager that gives back on leaving what is still held.

    Attributes:
        waiting: items that are not yet running; 0 once the ticket is closed.
        deadline: loop time after which nobody waits for them.
    """

    def __init__(
        self, batcher: "Batcher[K, T, R]", count: int, item_bytes: float, priority: Priority, deadline: float
    ) -> None:
        self._batcher = batcher
        self._shares: asyncio.Queue[BatchSlice[R]] = asyncio.Queue()
        self._lane: RequestQueue[Admission[K, T, R], T] | None = None
        self._submitted = 0
        self._answered = 0
        self._cause = "cancelled"
        self._item_bytes = item_bytes
        self.waiting = count
        self.priority = priority
        self.deadline = deadline
        self.is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Anything else that ends the request early is answered: nobody's work is lost.
        self.close(
            was_left=kind is not None and issubclass(kind, asyncio.CancelledError | GeneratorExit | DeadlineExceeded)
        )

    async def submit(self, key: K, items: Sequence[T]) -> AsyncGenerator[BatchSlice[R], None]:
        """Runs the items, at most as many as were admitted, and yields shares as their batches finish; works once."""
        self._batcher.enqueue(self, key, items)
        left = len(items)
        while left:
            share = await self._shares.get()
            left -= len(share.indices)
            yield share

    def join(self, lane: "RequestQueue[Admission[K, T, R], T]", count: int) -> None:
        """Takes its place in a lane, and gives back the room held beyond `count` items."""
        if self._lane is not None or count > self.waiting:
            raise ValueError(f"a ticket for {self.waiting} items takes at most so many, once; got {count}")
        self.leave(self.waiting - count)
        self._lane, self._submitted = lane, count
        lane.live += count

    def leave(self, count: int) -> None:
        """Gives back the room of `count` items."""
        self.waiting -= count
        self._batcher.leave(self.priority, count, count * self._item_bytes)
        if self._lane is not None:
            self._lane.live -= count

    def expire(self) -> None:
        """Ends what still waits, since the deadline has passed."""
        self._cause = "deadline"
        self._batcher.observer.dropped("deadline_queue", self.waiting)
        self.fail(DeadlineExceeded("the deadline passed while the boxes waited for the device"))

    def fail(self, error: Exception) -> None:
        """Answers everything that waits in a lane with an error."""
        count = self.waiting
        if self._lane is None or not count:
            return
        self.leave(count)
        indices = tuple(range(self._submitted - count, self._submitted))
        self.deliver(BatchSlice(indices, (error,) * count, queue_s=0.0, run_s=0.0, batch_size=0))

    def deliver(self, share: BatchSlice[R]) -> None:
        """Takes a finished share; harmless when nobody waits for it any more."""
        if self.is_open:
            self._shares.put_nowait(share)
            self._answered += len(share.indices)
            if self._answered == self._submitted:
                self._batcher.company.answers(self)
        else:
            self._batcher.observer.dropped(f"{self._cause}_device", len(share.indices))

    def close(self, *, was_left: bool = False) -> None:
        """Forgets what the ticket still holds; its items that run already finish and are thrown away."""
        if not self.is_open:
            return
        self.is_open = False
        if self.deadline <= asyncio.get_running_loop().time():
            self._cause = "deadline"
        unread = 0
        while not self._shares.empty():
            unread += len(self._shares.get_nowait().indices)
        if was_left:
            self._drop("entry" if self._lane is None else "queue", self.waiting)
            self._drop("encoding", unread)
        self.leave(self.waiting)
        self._batcher.forget(self, is_settled=self._lane is not None)

    def _drop(self, place: str, count: int) -> None:
        if count:
            self._batcher.observer.dropped(f"{self._cause}_{place}", count)


class Batcher(Generic[K, T, R]):
    """See the module. To be used from one event loop.

    Args:
        runners: each runs one batch at a time.
        max_batch_size: items in a batch.
        max_delay_s: longest wait for company while a runner is idle and some may come.
        max_waiting: items that are admitted and not yet running.
        max_bytes: memory that they may hold; a request that comes to an empty queue may hold more.
        patience_s: how much longer BATCH items may wait than INTERACTIVE ones; 0: first come, first served.
        observer: is told what happens.
    """

    def __init__(
        self,
        runners: Sequence["Runner[K, T, R]"],
        *,
        max_batch_size: int,
        max_delay_s: float,
        max_waiting: int,
        max_bytes: float = math.inf,
        patience_s: float = 0.0,
        observer: BatchObserver | None = None,
    ) -> None:
        self._idle = list(runners)
        self._pace = Throughput(len(runners), max_batch_size)
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._patience_s = patience_s
        self._debt = FairnessCredit(max_batch_size, is_first_come_first_served=patience_s == 0.0)
        self._lanes: dict[K, RequestQueue[Admission[K, T, R], T]] = {}
        self._tickets: set[Admission[K, T, R]] = set()
        self._waiting = dict.fromkeys(Priority, 0)
        self._bytes = 0.0
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._broken: Exception | None = None
        self.company = BatchDelayer(max_delay_s)
        self.observer: BatchObserver = observer or NullObserver()

    @property
    def waiting(self) -> int:
        """Items that are admitted and not yet running."""
        return sum(self._waiting.values())

    @property
    def waiting_bytes(self) -> float:
        """Memory that they were admitted with."""
        return self._bytes

    def admit(
        self,
        count: int,
        *,
        size_bytes: float = 0.0,
        priority: Priority = Priority.INTERACTIVE,
        deadline: float = math.inf,
    ) -> Admission[K, T, R]:
        """Room for `count` items.

        Args:
            count: items, ≥ 1.
            size_bytes: memory that all of them will hold while they wait.
            priority: who goes first.
            deadline: loop time after which nobody waits for them.

        Raises:
            Overloaded: there is no room, or what waits already takes longer than the deadline allows.
            Expired: the deadline has passed.
            Exception: what `break_off` was given.
        """
        if self._broken is not None:
            raise self._broken
        left_s = deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            self.observer.dropped("deadline_entry", count)
            raise DeadlineExceeded("the deadline passed before the work began")
        if self.waiting + count > self._max_waiting:
            raise QueueFull(
                f"{self.waiting} boxes wait for the device and {count} more would pass the limit of "
                f"{self._max_waiting}",
                self._retry_after_s(count),
            )
        if self.waiting and self._bytes + size_bytes > self._max_bytes:
            raise QueueFull(
                f"what waits for the device holds {self._bytes / 1e6:.0f} MB and {size_bytes / 1e6:.0f} MB more would "
                f"pass the limit of {self._max_bytes / 1e6:.0f} MB",
                self._retry_after_s(count),
            )
        if self._wait_s(priority) > left_s:
            raise QueueFull(
                f"{self.waiting} boxes wait for the device, about {self._wait_s(priority):.1f} s of work, and the "
                f"deadline is in {left_s:.1f} s",
                self._retry_after_s(count),
            )
        self._waiting[priority] += count
        self._bytes += size_bytes
        ticket = Admission(self, count, size_bytes / count, priority, deadline)
        self._tickets.add(ticket)
        self.company.arrives()
        return ticket

    def enqueue(self, ticket: Admission[K, T, R], key: K, items: Sequence[T]) -> None:
        """Puts a ticket's items into their lane and gives back the room that it held beyond them."""
        if self._broken is not None:
            raise self._broken
        lane = self._lanes.setdefault(key, RequestQueue(self._patience_s))
        ticket.join(lane, len(items))
        now = asyncio.get_running_loop().time()
        lane.queues[ticket.priority].extend(QueuedItem(ticket, index, item, now) for index, item in enumerate(items))
        self.company.settles()
        if lane.live >= self._max_batch_size:
            self._pump()
        else:
            self._pump_soon()

    def leave(self, priority: Priority, count: int, size_bytes: float) -> None:
        """Items wait no more: they run, or were given up."""
        self._waiting[priority] -= count
        self._bytes = self._bytes - size_bytes if self.waiting else 0.0

    def forget(self, ticket: Admission[K, T, R], *, is_settled: bool) -> None:
        """The ticket is closed, after or without having brought its items."""
        self._tickets.discard(ticket)
        self.company.leaves(ticket, asyncio.get_running_loop().time())
        if not is_settled:
            self.company.settles()
            self._pump_soon()  # others may have waited for this one's company

    def break_off(self, error: Exception) -> None:
        """Answers everything that waits, and whatever comes from now on, with an error."""
        self._broken = error
        for ticket in tuple(self._tickets):
            ticket.fail(error)

    async def idle(self) -> None:
        """Returns when no batch is running."""
        while self._running:
            await asyncio.wait(self._running)

    def _pump_soon(self) -> None:
        """Pumps once everything that is ready in the loop now has had its turn: it may bring company."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Starts every batch that is due on the runners that are idle, and wakes up when the next one will be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._idle:
            due_at, key = self._next_lane(loop.time())
            if key is None:
                return
            if due_at > loop.time() + TIMER_SLACK_S:
                self._timer = loop.call_at(due_at, self._pump)
                return
            entries = self._take(self._lanes[key])
            if not entries:  # their deadlines passed this very moment
                continue
            task = loop.create_task(self._run(self._idle.pop(), key, entries))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def _take(self, lane: RequestQueue[Admission[K, T, R], T]) -> list[QueuedItem[Admission[K, T, R], T]]:
        """The next batch of a lane."""
        now = asyncio.get_running_loop().time()
        return lane.take(self._max_batch_size, now, self._debt, self._others_bulk_rank(lane))

    def _others_bulk_rank(self, lane: RequestQueue[Admission[K, T, R], T]) -> float:
        """Of the BATCH items in all lanes but this, from when on the first goes ahead of what is submitted then."""
        return min((other.bulk_rank() for other in self._lanes.values() if other is not lane), default=math.inf)

    def _next_lane(self, now: float) -> tuple[float, K | None]:
        """When the next batch is due, and its key: a full lane at once, others when no company will come in time.

        Of several that are due the one whose first item ranks first. INTERACTIVE items do not wait for company while a
        device that is about to run BATCH ones alone could run them.
        """
        lanes = self._due(now)
        if not lanes:
            return 0.0, None
        due, rank, key = min(lanes, key=lambda lane: (max(lane[0], now + TIMER_SLACK_S), lane[1]))
        if due <= now + TIMER_SLACK_S and not self._lanes[key].queues[Priority.INTERACTIVE]:
            people = [lane for lane in lanes if self._lanes[lane[2]].queues[Priority.INTERACTIVE] and lane[1] < rank]
            if people:
                return now, min(people, key=lambda lane: lane[1])[2]
        return due, key

    def _due(self, now: float) -> list[tuple[float, tuple[bool, float, float], K]]:
        """(when it is due, its rank, its key) of each lane with live items."""
        for key, lane in list(self._lanes.items()):
            lane.clean(now)
            if not lane.live:
                del self._lanes[key]
        found = []
        expected_until = self.company.expected_until(now)
        for key, lane in self._lanes.items():
            is_full = lane.live >= self._max_batch_size
            due = lane.since() if is_full else min(lane.since() + self._max_delay_s, expected_until)
            rank = lane.rank(self._debt, self._max_batch_size, self._others_bulk_rank(lane))
            found.append((due, rank, key))
        return found

    async def _run(self, runner: "Runner[K, T, R]", key: K, entries: list[QueuedItem[Admission[K, T, R], T]]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            outcomes = await runner(key, [entry.item for entry in entries])
            if len(outcomes) != len(entries):
                raise RuntimeError(f"a runner gave {len(outcomes)} results for {len(entries)} items")
            self._pace.ran(len(entries), loop.time() - started)
            self.observer.batch_ended(len(entries), loop.time() - started)
        # Whatever a runner raises belongs to this batch alone: its callers get it, and the next batch runs.
        except Exception as error:
            outcomes = [error] * len(entries)
        took = loop.time() - started
        shares: dict[Admission[K, T, R], list[tuple[QueuedItem[Admission[K, T, R], T], R | Exception]]] = {}
        for entry, outcome in zip(entries, outcomes, strict=True):
            shares.setdefault(entry.ticket, []).append((entry, outcome))
        for ticket, pairs in shares.items():
            queue_s = started - min(entry.since for entry, _ in pairs)
            self.observer.waited(ticket.priority.value, queue_s)
            ticket.deliver(
                BatchSlice(
                    indices=tuple(entry.index for entry, _ in pairs),
                    outcomes=tuple(outcome for _, outcome in pairs),
                    queue_s=queue_s,
                    run_s=took,
                    batch_size=len(entries),
                )
            )
        self._idle.append(runner)
        self._pump()

    def _wait_s(self, priority: Priority) -> float:
        """Time of what goes ahead of a new request."""
        return self._pace.wait_s(self.waiting if priority is Priority.BATCH else self._waiting[Priority.INTERACTIVE])

    def _retry_after_s(self, count: int) -> float:
        """Time to work off what is too many, or half of what waits, whichever is more."""
        return self._pace.retry_after_s(max(self.waiting + count - self._max_waiting, self.waiting / 2))

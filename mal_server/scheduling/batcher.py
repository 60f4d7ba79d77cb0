"""Groups items of many requests into device batches. Pure asyncio; knows nothing of images, models or gRPC.

The life of a request, in the order of the methods below:

    admit     reserves capacity before the caller prepares its items; raises QueueFull if there is none
    enqueue   queues the prepared items under a key; only items with equal keys share a batch
    dispatch  starts a batch on an idle runner: at once if it is full or no more items are expected, and otherwise after
              `max_delay_s` at the latest. While all runners are busy, batches fill up
    deliver   gives each request with items in a finished batch its `BatchSlice`
    close     frees what the request still holds: its queued items never run, results of running ones are discarded

A cancelled caller, a missed deadline or a failed batch affects no other request or batch.

`RequestQueue` orders the items of one key: INTERACTIVE first, but BATCH never starves, and callers take turns.
`SharedCapacity` decides whether a request fits. `BatchDelayer` predicts whether more items will arrive. `Throughput`
estimates when a refused caller should retry.
"""

from __future__ import annotations

import asyncio
import math
import traceback
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import count as counter
from operator import attrgetter
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from mal_server.scheduling.admission import Admission, BatchSlice, DeadlineExceeded, QueueFull
from mal_server.scheduling.batch_delayer import BatchDelayer
from mal_server.scheduling.batch_observer import BatchObserver, NullObserver
from mal_server.scheduling.capacity import SharedCapacity
from mal_server.scheduling.priority import Priority
from mal_server.scheduling.request_queue import FairnessCredit, Heads, QueuedItem, RequestQueue, SortKey, first_of
from mal_server.scheduling.throughput import Throughput

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")

Runner = Callable[[Key, Sequence[Item]], Awaitable[Sequence[Result | Exception]]]
"""Runs the items of one batch; returns a result or an error for each, in order. If it raises, every item fails."""

_Batch: TypeAlias = list[QueuedItem[Admission[Key, Item, Result], Item]]

TIMER_SLACK_S = 1e-4
"""Event loops may fire a timer slightly early; a batch due within this time is due."""


class _ReadyQueue(NamedTuple, Generic[Key]):
    """State of a non-empty queue at one moment.

    Attributes:
        key: key of its items.
        due: loop time at which its next batch should start.
        sort_key: sort key of its first item.
        has_interactive: True if it holds INTERACTIVE items.
    """

    key: Key
    due: float
    sort_key: SortKey
    has_interactive: bool


class Batcher(Generic[Key, Item, Result]):
    """Batches the items of all requests to one model; used from one event loop.

    Callers use `admit`, then `Admission.submit`. `enqueue` and `close` are for `Admission` only.

    >>> async def double(key: str, items: Sequence[int]) -> list[int]:
    ...     return [2 * item for item in items]
    >>> async def request(batcher: Batcher[str, int, int], *items: int) -> None:
    ...     with batcher.admit(len(items)) as admission:
    ...         async for batch_slice in admission.submit("key", items):
    ...             print(batch_slice.indices, batch_slice.outcomes, batch_slice.batch_size)
    >>> async def main() -> None:
    ...     batcher = Batcher([double], max_batch_size=4, max_delay_s=0.01, max_waiting=100)
    ...     await asyncio.gather(request(batcher, 1, 2), request(batcher, 5))
    >>> asyncio.run(main())
    (0, 1) (2, 4) 3
    (0,) (10,) 3

    Args:
        runners: one for each batch that may run at a time, for example one per device.
        max_batch_size: limit of items in a batch.
        max_delay_s: longest time that an idle runner waits for a fuller batch while more items are expected.
        max_waiting: limit of items that are admitted and not yet started.
        max_bytes: limit of the memory of all requests, from `admit` to `close` or `free_taken`.
        batch_share: part of both limits that BATCH may fill.
        caller_share: part of what its priority may fill that one caller may (`SharedCapacity`).
        batch_aging_s: time after which BATCH items are guaranteed a quarter of the device; 0: first come, first served.
        observer: receives events for metrics.
    """

    def __init__(
        self,
        runners: Sequence[Runner[Key, Item, Result]],
        *,
        max_batch_size: int,
        max_delay_s: float,
        max_waiting: int,
        max_bytes: float = math.inf,
        batch_share: float = 1.0,
        caller_share: float = 1.0,
        batch_aging_s: float = 0.0,
        observer: BatchObserver | None = None,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._batch_aging_s = batch_aging_s
        self._observer: BatchObserver = observer or NullObserver()

        self._open_admissions: set[Admission[Key, Item, Result]] = set()
        self._waiting = SharedCapacity(max_waiting, batch_share=batch_share, caller_share=caller_share)
        self._bytes = SharedCapacity(max_bytes, batch_share=batch_share, caller_share=caller_share)
        self._turns = counter()
        self._queues: dict[Key, RequestQueue[Admission[Key, Item, Result], Item]] = {}
        self._credit = FairnessCredit(max_batch_size, is_first_come_first_served=batch_aging_s == 0.0)
        self._delayer = BatchDelayer(return_window_s=max_delay_s)
        self._throughput = Throughput(len(runners), max_batch_size)
        self._idle_runners = list(runners)
        self._running_batches: set[asyncio.Task[None]] = set()
        self._next_dispatch: asyncio.Handle | None = None
        self._failure: Exception | None = None

    @property
    def waiting(self) -> int:
        """Number of items admitted and not yet started, queued or still being prepared."""
        return self._waiting.used

    @property
    def held_bytes(self) -> int:
        """Bytes that open requests hold, as given to `admit`, without those of results that were taken."""
        return self._bytes.used

    def admit(
        self,
        count: int,
        *,
        size_bytes: int = 0,
        shared_bytes: int = 0,
        priority: Priority = Priority.INTERACTIVE,
        caller: Hashable = "",
        deadline: float = math.inf,
    ) -> Admission[Key, Item, Result]:
        """Reserves capacity for a request; the caller must close the admission, which is a context manager.

        Args:
            count: number of items, at least 1.
            size_bytes: memory that the items and their results hold.
            shared_bytes: memory that the request holds until it is closed, however many items are left.
            priority: priority of all items.
            caller: callers of one priority take turns, and each may hold its share only.
            deadline: time of the event loop's clock (`loop.time()`) after which no item may start.

        Raises:
            QueueFull: no capacity is left, or the items ahead would take until after the deadline.
            DeadlineExceeded: the deadline has passed.
            Exception: the error given to `fail_all`, once that was called.
        """
        if self._failure is not None:
            raise self._failure
        remaining_s = deadline - asyncio.get_running_loop().time()
        if remaining_s <= 0:
            self._observer.dropped("deadline_entry", count)
            raise DeadlineExceeded("the deadline passed before the request started")
        ahead = self._ahead(priority, caller)
        problem, excess = self._capacity_problem(count, size_bytes + shared_bytes, priority, caller)
        wait_s = self._throughput.wait_s(ahead)
        if not problem and wait_s > remaining_s:
            problem = f"queue too long: about {wait_s:.1f} s of work is ahead, the deadline is in {remaining_s:.1f} s"
        if problem:
            # Retry when the excess has run, but not before half of what is ahead has.
            raise QueueFull(problem, self._throughput.retry_after_s(max(excess, ahead / 2)))
        self._waiting.take(count, priority, caller)
        self._bytes.take(size_bytes + shared_bytes, priority, caller)
        admission = Admission(
            self, count, size_bytes, shared_bytes, priority=priority, caller=caller, deadline=deadline
        )
        self._open_admissions.add(admission)
        self._delayer.on_admit(admission)
        return admission

    def _ahead(self, priority: Priority, caller: Hashable) -> int:
        """Returns the number of items, at most, that start before the next one of a caller."""
        waiting = self._waiting
        own = waiting.used_by(priority, caller)
        turns = min(waiting.used_by(priority), (own + 1) * max(waiting.callers(priority), 1))
        return turns + (waiting.used_by(Priority.INTERACTIVE) if priority is Priority.BATCH else 0)

    def _capacity_problem(self, count: int, size_bytes: int, priority: Priority, caller: Hashable) -> tuple[str, float]:
        """Returns why a request cannot be admitted, or an empty string, and the number of items in excess."""
        excess = self._waiting.excess(count, priority, caller)
        if excess:
            return (
                f"queue full: {count} boxes more exceed max_queue_crops by {excess:.0f} for {priority.value} calls",
                excess,
            )
        excess_bytes = self._bytes.excess(size_bytes, priority, caller)
        if excess_bytes:
            return _too_many_bytes(size_bytes, excess_bytes, priority), 0.0
        return "", 0.0

    def enqueue(self, admission: Admission[Key, Item, Result], key: Key, items: Sequence[Item]) -> None:
        """Queues the items of a request and frees capacity that it reserved in excess. See `Admission.submit`."""
        if self._failure is not None:
            raise self._failure
        if admission.queue is not None or len(items) > admission.waiting:
            raise ValueError(f"submit: {len(items)} items; an admission takes at most {admission.waiting} items, once")
        unused = admission.waiting - len(items)
        self._release(admission, unused)
        self.free(admission, unused * admission.item_bytes)
        queue = self._queues.setdefault(key, RequestQueue(self._batch_aging_s))
        queue.add(admission, items, asyncio.get_running_loop().time(), next(self._turns))
        admission.queue, admission.unanswered = queue, len(items)
        self._delayer.on_submit(admission)
        if queue.size >= self._max_batch_size:
            self._dispatch()
        else:
            self._schedule_dispatch()

    def _release(self, admission: Admission[Key, Item, Result], count: int) -> None:
        """Counts items as no longer waiting: they have started or never will."""
        admission.waiting -= count
        self._waiting.give_back(count, admission.priority, admission.caller)

    def hold(self, admission: Admission[Key, Item, Result], size_bytes: int) -> None:
        """Counts further bytes of a request. See `Admission.hold`."""
        if size_bytes <= 0:
            return
        excess_bytes = self._bytes.excess(size_bytes, admission.priority, admission.caller)
        if excess_bytes and self._bytes.used > admission.held_bytes:
            problem = _too_many_bytes(size_bytes, excess_bytes, admission.priority)
            raise QueueFull(problem, self._throughput.retry_after_s(self.waiting / 2))
        self._bytes.take(size_bytes, admission.priority, admission.caller)
        admission.held_bytes += size_bytes
        admission.taken_bytes += size_bytes

    def free(self, admission: Admission[Key, Item, Result], size_bytes: int) -> None:
        """Counts bytes of a request as free. See `Admission.free_taken`."""
        admission.held_bytes -= size_bytes
        self._bytes.give_back(size_bytes, admission.priority, admission.caller)

    def _schedule_dispatch(self) -> None:
        """Dispatches after the callbacks that are ready now, since they may add items to the same batch."""
        self._cancel_scheduled_dispatch()
        self._next_dispatch = asyncio.get_running_loop().call_soon(self._dispatch)

    def _cancel_scheduled_dispatch(self) -> None:
        if self._next_dispatch is not None:
            self._next_dispatch.cancel()
            self._next_dispatch = None

    def _dispatch(self) -> None:
        """Starts due batches while a runner is idle; schedules itself for the next batch that becomes due."""
        self._cancel_scheduled_dispatch()
        loop = asyncio.get_running_loop()
        while self._idle_runners:
            now = loop.time()
            ready = self._ready_queues(now)
            if not ready:
                return
            due = [queue for queue in ready if queue.due <= now + TIMER_SLACK_S]
            if not due:
                self._next_dispatch = loop.call_at(min(queue.due for queue in ready), self._dispatch)
                return
            self._start_batch(_first_queue(due, ready).key, now)

    def _ready_queues(self, now: float) -> list[_ReadyQueue[Key]]:
        """Drops items past their deadline and removes empty queues; returns the state of the others."""
        for key, queue in list(self._queues.items()):
            self._drop_expired(queue, now)
            if not queue.size:
                del self._queues[key]
        no_more_items_after = self._delayer.wait_until(now)
        ready = []
        for key, queue in self._queues.items():
            oldest = queue.oldest_arrival()
            is_full = queue.size >= self._max_batch_size
            due = oldest if is_full else min(oldest + self._max_delay_s, no_more_items_after)
            sort_key = queue.sort_key(self._credit, self._max_batch_size, self._other_heads(key))
            ready.append(_ReadyQueue(key, due, sort_key, queue.has_interactive))
        return ready

    def _other_heads(self, key: Key) -> Heads:
        """Returns the first items of the other keys."""
        return first_of(queue.heads() for other, queue in self._queues.items() if other != key)

    def _start_batch(self, key: Key, now: float) -> None:
        """Moves up to `max_batch_size` items of a key from their queue to an idle runner."""
        queue = self._queues[key]
        batch: _Batch[Key, Item, Result] = []
        while len(batch) < self._max_batch_size:
            self._drop_expired(queue, now)
            if not queue.size:
                break
            item = queue.pop(self._credit, self._other_heads(key))
            self._end_turn(item.client)
            self._release(item.client, 1)
            batch.append(item)
        task = asyncio.get_running_loop().create_task(self._run(self._idle_runners.pop(), key, batch))
        self._running_batches.add(task)
        task.add_done_callback(self._running_batches.discard)

    def _end_turn(self, admission: Admission[Key, Item, Result]) -> None:
        turn = next(self._turns)
        for queue in self._queues.values():
            queue.end_turn(admission, turn)

    async def _run(self, runner: Runner[Key, Item, Result], key: Key, batch: _Batch[Key, Item, Result]) -> None:
        """Runs one batch, delivers its outcomes, and frees the runner for the next batch."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        outcomes: Sequence[Result | Exception]
        try:
            outcomes = await runner(key, [item.item for item in batch])
            if len(outcomes) != len(batch):
                raise RuntimeError(f"runner: {len(outcomes)} results for {len(batch)} items")
            self._throughput.record(len(batch), loop.time() - started)
            self._observer.batch_ended(len(batch), loop.time() - started)
        # A runner's error fails this batch only: its requests receive the error, and the next batch runs.
        except Exception as error:
            outcomes = [_without_frames(error)] * len(batch)
        run_s = loop.time() - started
        self._idle_runners.append(runner)
        if self._queues and all(queue.size >= self._max_batch_size for queue in self._queues.values()):
            self._dispatch()  # before clients are answered: a full batch expects none, and finishing takes the cores
        for admission, batch_slice in _slices(batch, outcomes, started, run_s):
            self._observer.waited(admission.priority.value, batch_slice.queue_s)
            self._deliver(admission, batch_slice)
        self._dispatch()

    def _deliver(self, admission: Admission[Key, Item, Result], batch_slice: BatchSlice[Result]) -> None:
        count = len(batch_slice.indices)
        if not admission.is_open:
            self._observe_dropped(admission, "device", count)
            return
        admission.slices.put_nowait(batch_slice)
        admission.unanswered -= count
        if not admission.unanswered:
            self._delayer.on_answer(admission)

    def close(self, admission: Admission[Key, Item, Result], *, cancelled: bool) -> None:
        """Ends a request. See `Admission.close`."""
        if not admission.is_open:
            return
        admission.is_open = False
        self._open_admissions.discard(admission)
        now = asyncio.get_running_loop().time()
        if admission.deadline <= now:  # the caller gave up because of its deadline
            admission.drop_cause = "deadline"
        unread = _clear(admission.slices)
        if cancelled:
            self._observe_dropped(admission, "entry" if admission.queue is None else "queue", admission.waiting)
            self._observe_dropped(admission, "encoding", unread)
        self._release(admission, admission.waiting)
        self.free(admission, admission.held_bytes)
        self._delayer.on_close(admission, now)
        if admission.queue is not None:
            admission.queue.remove(admission)
        else:
            self._schedule_dispatch()  # a batch may be waiting for the items of this request

    def _observe_dropped(self, admission: Admission[Key, Item, Result], stage: str, count: int) -> None:
        if count:
            self._observer.dropped(f"{admission.drop_cause}_{stage}", count)

    def _drop_expired(self, queue: RequestQueue[Admission[Key, Item, Result], Item], now: float) -> None:
        while expired := queue.expired(now):
            for admission in expired:
                admission.drop_cause = "deadline"
                self._observe_dropped(admission, "queue", admission.waiting)
                error = DeadlineExceeded("the deadline passed while the boxes waited for the device")
                self._fail_queued(admission, error)

    def _fail_queued(self, admission: Admission[Key, Item, Result], error: Exception) -> None:
        """Removes the queued items of a request and delivers `error` for each."""
        indices = admission.queue.remove(admission) if admission.queue is not None else ()
        if indices:
            self._release(admission, len(indices))
            outcomes = (error,) * len(indices)
            self._deliver(admission, BatchSlice(indices, outcomes, queue_s=0.0, run_s=0.0, batch_size=0))

    def fail_all(self, error: Exception) -> None:
        """Fails every queued item and every later request with `error`; running batches finish."""
        self._failure = error
        for admission in tuple(self._open_admissions):
            self._fail_queued(admission, error)

    async def wait_until_idle(self) -> None:
        """Returns when no batch is running."""
        while self._running_batches:
            await asyncio.wait(self._running_batches)


def _first_queue(due: Sequence[_ReadyQueue[Key]], ready: Sequence[_ReadyQueue[Key]]) -> _ReadyQueue[Key]:
    """Returns the queue of the next batch: the first of the due ones by sort key.

    If that one holds BATCH items only, a queue with INTERACTIVE items that sorts before it goes first, even if it is
    not due: INTERACTIVE items wait for a fuller batch only while the device is idle.
    """
    first = min(due, key=attrgetter("sort_key"))
    if first.has_interactive:
        return first
    interactive = (queue for queue in ready if queue.has_interactive)
    return min((first, *interactive), key=attrgetter("sort_key"))


def _slices(
    batch: _Batch[Key, Item, Result], outcomes: Sequence[Result | Exception], started: float, run_s: float
) -> list[tuple[Admission[Key, Item, Result], BatchSlice[Result]]]:
    """Splits a finished batch into one slice for each request."""
    positions_by_request: dict[Admission[Key, Item, Result], list[int]] = {}
    for position, item in enumerate(batch):
        positions_by_request.setdefault(item.client, []).append(position)
    return [
        (
            admission,
            BatchSlice(
                indices=tuple(batch[position].index for position in positions),
                outcomes=tuple(outcomes[position] for position in positions),
                queue_s=started - min(batch[position].arrival for position in positions),
                run_s=run_s,
                batch_size=len(batch),
            ),
        )
        for admission, positions in positions_by_request.items()
    ]


def _too_many_bytes(size_bytes: int, excess_bytes: float, priority: Priority) -> str:
    needed, over = size_bytes / 1e6, excess_bytes / 1e6
    return f"queue full: {needed:.1f} MB more exceed max_queue_bytes by {over:.1f} for {priority.value} calls"


def _without_frames(error: Exception) -> Exception:
    """Returns an error of a runner whose traceback keeps no batch in memory; the lines that it names remain."""
    traceback.clear_frames(error.__traceback__)
    # The frame of the batcher itself cannot be cleared while it runs.
    return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)


def _clear(slices: asyncio.Queue[BatchSlice[Result]]) -> int:
    """Empties a queue of slices and returns the number of their items."""
    count = 0
    while not slices.empty():
        count += len(slices.get_nowait().indices)
    return count

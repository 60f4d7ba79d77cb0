"""Groups items of many requests into device batches. Pure asyncio; knows nothing of images, models or gRPC.

The life of a request, in the order of the methods below:

    admit     reserves capacity before the caller prepares its items; raises QueueFull if there is none
    enqueue   queues the prepared items under a key; only items with equal keys share a batch
    dispatch  starts a batch on an idle runner: at once if it is full or no more items are expected, and otherwise after
              `max_delay_s` at the latest. While all runners are busy, batches fill up
    deliver   gives each request with items in a finished batch its `BatchSlice`
    close     frees what the request still holds: its queued items never run, results of running ones are discarded

A cancelled caller, a missed deadline or a failed batch affects no other request or batch.

`RequestQueue` orders the items of one key: INTERACTIVE first, but BATCH never starves. `BatchDelayer` predicts whether
more items will arrive. `Throughput` estimates when a refused caller should retry. All counting is done here.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from operator import attrgetter
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from mal_server.scheduling.admission import Admission, BatchSlice, DeadlineExceeded, QueueFull
from mal_server.scheduling.batch_delayer import BatchDelayer
from mal_server.scheduling.batch_observer import BatchObserver, NullObserver
from mal_server.scheduling.priority import Priority
from mal_server.scheduling.request_queue import FairnessCredit, QueuedItem, RequestQueue, SortKey
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
        max_bytes: limit of the memory of those items; a request that arrives while none wait may exceed it.
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
        batch_aging_s: float = 0.0,
        observer: BatchObserver | None = None,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._batch_aging_s = batch_aging_s
        self._observer: BatchObserver = observer or NullObserver()

        self._open_admissions: set[Admission[Key, Item, Result]] = set()
        self._waiting = dict.fromkeys(Priority, 0)
        self._waiting_bytes = 0.0
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
        return sum(self._waiting.values())

    @property
    def waiting_bytes(self) -> float:
        """Bytes that these items hold, as given to `admit`."""
        return self._waiting_bytes

    def admit(
        self,
        count: int,
        *,
        size_bytes: float = 0.0,
        priority: Priority = Priority.INTERACTIVE,
        deadline: float = math.inf,
    ) -> Admission[Key, Item, Result]:
        """Reserves capacity for a request; the caller must close the admission, which is a context manager.

        Args:
            count: number of items, at least 1.
            size_bytes: memory that all items together hold while they wait.
            priority: priority of all items.
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
        problem = self._capacity_problem(count, size_bytes, priority, remaining_s)
        if problem:
            # Retry when the excess has run, but not before half of the queue has.
            excess = max(self.waiting + count - self._max_waiting, self.waiting / 2)
            raise QueueFull(problem, self._throughput.retry_after_s(excess))
        self._waiting[priority] += count
        self._waiting_bytes += size_bytes
        admission = Admission(self, count, item_bytes=size_bytes / count, priority=priority, deadline=deadline)
        self._open_admissions.add(admission)
        self._delayer.on_admit(admission)
        return admission

    def _capacity_problem(self, count: int, size_bytes: float, priority: Priority, remaining_s: float) -> str:
        """Returns why a request cannot be admitted, or an empty string."""
        if self.waiting + count > self._max_waiting:
            return f"queue full: {self.waiting} boxes wait, {count} more exceed the limit of {self._max_waiting}"
        if self.waiting and self._waiting_bytes + size_bytes > self._max_bytes:
            return (
                f"queue full: waiting requests hold {self._waiting_bytes / 1e6:.0f} MB, {size_bytes / 1e6:.0f} MB more "
                f"exceed the limit of {self._max_bytes / 1e6:.0f} MB"
            )
        ahead = self.waiting if priority is Priority.BATCH else self._waiting[Priority.INTERACTIVE]
        wait_s = self._throughput.wait_s(ahead)
        if wait_s > remaining_s:
            return f"queue too long: about {wait_s:.1f} s of work is ahead, the deadline is in {remaining_s:.1f} s"
        return ""

    def enqueue(self, admission: Admission[Key, Item, Result], key: Key, items: Sequence[Item]) -> None:
        """Queues the items of a request and frees capacity that it reserved in excess. See `Admission.submit`."""
        if self._failure is not None:
            raise self._failure
        if admission.queue is not None or len(items) > admission.waiting:
            raise ValueError(f"submit: {len(items)} items; an admission takes at most {admission.waiting} items, once")
        self._release(admission, admission.waiting - len(items))
        queue = self._queues.setdefault(key, RequestQueue(self._batch_aging_s))
        queue.add(admission, items, asyncio.get_running_loop().time())
        admission.queue, admission.unanswered = queue, len(items)
        self._delayer.on_submit(admission)
        if queue.size >= self._max_batch_size:
            self._dispatch()
        else:
            self._schedule_dispatch()

    def _release(self, admission: Admission[Key, Item, Result], count: int) -> None:
        """Frees the capacity of `count` items that have started or never will."""
        admission.waiting -= count
        self._waiting[admission.priority] -= count
        # Reset to 0 when nothing waits, so that rounding errors do not add up.
        self._waiting_bytes = self._waiting_bytes - count * admission.item_bytes if self.waiting else 0.0

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
            sort_key = queue.sort_key(self._credit, self._max_batch_size, self._other_batch_arrival(key))
            ready.append(_ReadyQueue(key, due, sort_key, queue.has_interactive))
        return ready

    def _other_batch_arrival(self, key: Key) -> float:
        """Returns the earliest `RequestQueue.batch_arrival` of the other keys; math.inf if they hold no BATCH items."""
        others = (queue for other, queue in self._queues.items() if other != key)
        return min((queue.batch_arrival() for queue in others), default=math.inf)

    def _start_batch(self, key: Key, now: float) -> None:
        """Moves up to `max_batch_size` items of a key from their queue to an idle runner."""
        queue, other_batch_arrival = self._queues[key], self._other_batch_arrival(key)
        batch: _Batch[Key, Item, Result] = []
        while len(batch) < self._max_batch_size:
            self._drop_expired(queue, now)
            if not queue.size:
                break
            item = queue.pop(self._credit, other_batch_arrival)
            self._release(item.client, 1)
            batch.append(item)
        task = asyncio.get_running_loop().create_task(self._run(self._idle_runners.pop(), key, batch))
        self._running_batches.add(task)
        task.add_done_callback(self._running_batches.discard)

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
            outcomes = [error] * len(batch)
        run_s = loop.time() - started
        for admission, batch_slice in _slices(batch, outcomes, started, run_s):
            self._observer.waited(admission.priority.value, batch_slice.queue_s)
            self._deliver(admission, batch_slice)
        self._idle_runners.append(runner)
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
        if cancelled:
            self._observe_dropped(admission, "entry" if admission.queue is None else "queue", admission.waiting)
            self._observe_dropped(admission, "encoding", _clear(admission.slices))
        self._release(admission, admission.waiting)
        self._delayer.on_close(admission, now)
        if admission.queue is not None:
            admission.queue.remove(admission)
        else:
            self._schedule_dispatch()  # a batch may be waiting for the items of this request

    def _observe_dropped(self, admission: Admission[Key, Item, Result], stage: str, count: int) -> None:
        if count:
            self._observer.dropped(f"{admission.drop_cause}_{stage}", count)

    def _drop_expired(self, queue: RequestQueue[Admission[Key, Item, Result], Item], now: float) -> None:
        for admission in queue.expired(now):
            admission.drop_cause = "deadline"
            self._observe_dropped(admission, "queue", admission.waiting)
            self._fail_queued(admission, DeadlineExceeded("the deadline passed while the boxes waited for the device"))

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


def _clear(slices: asyncio.Queue[BatchSlice[Result]]) -> int:
    """Empties a queue of slices and returns the number of their items."""
    count = 0
    while not slices.empty():
        count += len(slices.get_nowait().indices)
    return count

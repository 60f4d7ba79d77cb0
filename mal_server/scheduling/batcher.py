"""Groups items of many requests into device batches. Pure asyncio; knows nothing of images, models or gRPC.

The life of a request, all of it counted here:

    admit     reserves capacity for its items before anything is spent on them, or raises QueueFull → Admission
    enqueue   puts its prepared items into the queue of their key; only equal keys share a batch
    dispatch  an idle runner takes the next batch: full at once, else when no more items are expected, and after
              `max_delay_s` at the latest, so a single client is not delayed. A busy runner lets batches fill
    deliver   each batch yields one BatchSlice to every request with items in it, in the request's own queue of slices
    close     releases what is left: never run if still queued, discarded if running

A caller that is cancelled, a deadline that passes and an error of a runner affect their own request or batch only.

Elsewhere: `RequestQueue` orders items (INTERACTIVE first, BATCH never starves), `BatchDelayer` predicts arrivals,
`Throughput` estimates when a refused caller should retry.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from mal_server.scheduling.admission import Admission, BatchSlice, DeadlineExceeded, QueueFull
from mal_server.scheduling.batch_delayer import BatchDelayer
from mal_server.scheduling.batch_observer import BatchObserver, NullObserver
from mal_server.scheduling.priority import Priority
from mal_server.scheduling.request_queue import FairnessCredit, QueuedItem, RequestQueue, SortKey
from mal_server.scheduling.throughput import Throughput

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
R = TypeVar("R")

Runner = Callable[[K, Sequence[T]], Awaitable[Sequence[R | Exception]]]
"""Runs one batch; returns a result or an error for each item, in order. An exception it raises fails every item."""

TIMER_SLACK_S = 1e-4
"""Event loops may fire a timer slightly early; a batch due within this time is due."""


class Batcher(Generic[K, T, R]):
    """Counts, queues and runs the items of all requests of one model; used from one event loop.

    Args:
        runners: each runs one batch at a time.
        max_batch_size: items in a batch.
        max_delay_s: longest time that an idle runner waits for a fuller batch while more items are expected.
        max_waiting: items admitted and not yet started.
        max_bytes: memory that they may hold; a request that comes to an empty queue may exceed it.
        batch_aging_s: time after which BATCH items are guaranteed a quarter of the device; 0: first come, first served.
        observer: receives events for metrics.
    """

    def __init__(
        self,
        runners: Sequence["Runner[K, T, R]"],
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

        self._open: set[Admission[K, T, R]] = set()
        self._waiting = dict.fromkeys(Priority, 0)
        self._waiting_bytes = 0.0
        self._queues: dict[K, RequestQueue[Admission[K, T, R], T]] = {}
        self._credit = FairnessCredit(max_batch_size, is_first_come_first_served=batch_aging_s == 0.0)
        self._delayer = BatchDelayer(return_window_s=max_delay_s)
        self._throughput = Throughput(len(runners), max_batch_size)
        self._idle = list(runners)
        self._running: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._failure: Exception | None = None

    @property
    def waiting(self) -> int:
        """Items admitted and not yet started."""
        return sum(self._waiting.values())

    @property
    def waiting_bytes(self) -> float:
        """Memory that they hold, as admitted."""
        return self._waiting_bytes

    def admit(
        self,
        count: int,
        *,
        size_bytes: float = 0.0,
        priority: Priority = Priority.INTERACTIVE,
        deadline: float = math.inf,
    ) -> Admission[K, T, R]:
        """Reserves capacity for a request.

        Args:
            count: items, ≥ 1.
            size_bytes: memory that all of them hold while they wait.
            priority: of all of them.
            deadline: loop time from which they must not start.

        Raises:
            QueueFull: no capacity is left, or the items ahead take longer than the deadline allows.
            DeadlineExceeded: the deadline has passed.
            Exception: the argument of `fail_all`, after it was called.
        """
        if self._failure is not None:
            raise self._failure
        remaining_s = deadline - asyncio.get_running_loop().time()
        if remaining_s <= 0:
            self._observer.dropped("deadline_entry", count)
            raise DeadlineExceeded("the deadline passed before the request started")
        problem = self._capacity_problem(count, size_bytes, priority, remaining_s)
        if problem:
            excess = max(self.waiting + count - self._max_waiting, self.waiting / 2)
            raise QueueFull(problem, self._throughput.retry_after_s(excess))
        self._waiting[priority] += count
        self._waiting_bytes += size_bytes
        admission = Admission(self, count, item_bytes=size_bytes / count, priority=priority, deadline=deadline)
        self._open.add(admission)
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

    def enqueue(self, admission: Admission[K, T, R], key: K, items: Sequence[T]) -> None:
        """Queues a request's items and releases the capacity that it does not need; called by `Admission.submit`."""
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

    def _release(self, admission: Admission[K, T, R], count: int) -> None:
        """Frees the capacity of items that started or never will."""
        admission.waiting -= count
        self._waiting[admission.priority] -= count
        # Exactly 0 when nothing waits: rounding errors must not add up.
        self._waiting_bytes = self._waiting_bytes - count * admission.item_bytes if self.waiting else 0.0

    def _schedule_dispatch(self) -> None:
        """Dispatches after all callbacks that are ready now: they may add items to the same batch."""
        self._cancel_timer()
        self._timer = asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Starts every batch that is due on the idle runners, then sets a timer for the next one."""
        self._cancel_timer()
        loop = asyncio.get_running_loop()
        while self._idle:
            now = loop.time()
            ready = self._ready_queues(now)
            if not ready:
                return
            next_queue = self._pick_queue(ready, now)
            if next_queue.due > now + TIMER_SLACK_S:
                self._timer = loop.call_at(next_queue.due, self._dispatch)
                return
            self._start_batch(next_queue.key, now)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ready_queues(self, now: float) -> list["_ReadyQueue[K]"]:
        """Returns the queues with items, each with the time at which its next batch is due and its sort key."""
        for key, queue in list(self._queues.items()):
            self._drop_expired(queue, now)
            if not queue.size:
                del self._queues[key]
        no_more_from = self._delayer.wait_until(now)
        ready = []
        for key, queue in self._queues.items():
            oldest = queue.oldest_arrival()
            is_full = queue.size >= self._max_batch_size
            due = oldest if is_full else min(oldest + self._max_delay_s, no_more_from)
            sort_key = queue.sort_key(self._credit, self._max_batch_size, self._other_batch_arrival(key))
            ready.append(_ReadyQueue(due, sort_key, key, queue.has_interactive))
        return ready

    def _pick_queue(self, ready: Sequence["_ReadyQueue[K]"], now: float) -> "_ReadyQueue[K]":
        """Returns the queue of the next batch: of those that are due the first by sort key, else the next one due.

        INTERACTIVE items do not wait for a fuller batch while the device would start one with only BATCH items.
        """
        soon = now + TIMER_SLACK_S
        first = min(ready, key=lambda queue: (max(queue.due, soon), queue.sort_key))
        if first.due <= soon and not first.has_interactive:
            interactive = [queue for queue in ready if queue.has_interactive and queue.sort_key < first.sort_key]
            if interactive:
                return min(interactive, key=lambda queue: queue.sort_key)._replace(due=now)
        return first

    def _other_batch_arrival(self, key: K) -> float:
        """Returns the effective arrival of the oldest BATCH item in the queues of other keys."""
        others = (queue for other, queue in self._queues.items() if other != key)
        return min((queue.batch_arrival() for queue in others), default=math.inf)

    def _start_batch(self, key: K, now: float) -> None:
        queue, other_batch_arrival = self._queues[key], self._other_batch_arrival(key)
        batch: _Batch[K, T, R] = []
        while len(batch) < self._max_batch_size:
            self._drop_expired(queue, now)
            if not queue.size:
                break
            item = queue.pop(self._credit, other_batch_arrival)
            self._release(item.client, 1)
            batch.append(item)
        task = asyncio.get_running_loop().create_task(self._run(self._idle.pop(), key, batch))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, runner: "Runner[K, T, R]", key: K, batch: "_Batch[K, T, R]") -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        outcomes: Sequence[R | Exception]
        try:
            outcomes = await runner(key, [item.item for item in batch])
            if len(outcomes) != len(batch):
                raise RuntimeError(f"runner: {len(outcomes)} results for {len(batch)} items")
            self._throughput.record(len(batch), loop.time() - started)
            self._observer.batch_ended(len(batch), loop.time() - started)
        # An error of a runner belongs to this batch alone: its requests receive it, and the next batch runs.
        except Exception as error:
            outcomes = [error] * len(batch)
        run_s = loop.time() - started
        for admission, batch_slice in _slices(batch, outcomes, started, run_s):
            self._observer.waited(admission.priority.value, batch_slice.queue_s)
            self._deliver(admission, batch_slice)
        self._idle.append(runner)
        self._dispatch()

    def _deliver(self, admission: Admission[K, T, R], batch_slice: BatchSlice[R]) -> None:
        count = len(batch_slice.indices)
        if not admission.is_open:
            self._observer.dropped(f"{admission.drop_cause}_device", count)
            return
        admission.slices.put_nowait(batch_slice)
        admission.unanswered -= count
        if not admission.unanswered:
            self._delayer.on_answer(admission)

    def _drop_expired(self, queue: RequestQueue[Admission[K, T, R], T], now: float) -> None:
        for admission in queue.expired(now):
            admission.drop_cause = "deadline"
            self._observer.dropped("deadline_queue", admission.waiting)
            self._fail(admission, DeadlineExceeded("the deadline passed while the boxes waited for the device"))

    def _fail(self, admission: Admission[K, T, R], error: Exception) -> None:
        """Delivers an error for every item that is still queued."""
        indices = admission.queue.remove(admission) if admission.queue is not None else ()
        if indices:
            self._release(admission, len(indices))
            outcomes = (error,) * len(indices)
            self._deliver(admission, BatchSlice(indices, outcomes, queue_s=0.0, run_s=0.0, batch_size=0))

    def fail_all(self, error: Exception) -> None:
        """Fails every queued item and every later request with `error`; running batches finish."""
        self._failure = error
        for admission in tuple(self._open):
            self._fail(admission, error)

    def close(self, admission: Admission[K, T, R], *, cancelled: bool) -> None:
        """Ends a request; called by `Admission.close`."""
        if not admission.is_open:
            return
        admission.is_open = False
        self._open.discard(admission)
        now = asyncio.get_running_loop().time()
        if admission.deadline <= now:
            admission.drop_cause = "deadline"
        if cancelled:
            self._count_dropped(admission, "entry" if admission.queue is None else "queue", admission.waiting)
            self._count_dropped(admission, "encoding", _unread(admission.slices))
        self._release(admission, admission.waiting)
        self._delayer.on_close(admission, now)
        if admission.queue is not None:
            admission.queue.remove(admission)
        else:
            self._schedule_dispatch()  # a batch may have waited for its items

    def _count_dropped(self, admission: Admission[K, T, R], stage: str, count: int) -> None:
        if count:
            self._observer.dropped(f"{admission.drop_cause}_{stage}", count)

    async def idle(self) -> None:
        """Returns when no batch is running."""
        while self._running:
            await asyncio.wait(self._running)


_Batch: TypeAlias = list[QueuedItem[Admission[K, T, R], T]]


class _ReadyQueue(NamedTuple, Generic[K]):
    """A queue with items.

    Attributes:
        due: loop time at which its next batch should start.
        sort_key: of its first item.
        key: of its items.
        has_interactive: whether some are INTERACTIVE.
    """

    due: float
    sort_key: SortKey
    key: K
    has_interactive: bool


def _slices(
    batch: "_Batch[K, T, R]", outcomes: Sequence[R | Exception], started: float, run_s: float
) -> list[tuple[Admission[K, T, R], BatchSlice[R]]]:
    """Splits a finished batch by request."""
    by_request: dict[Admission[K, T, R], list[tuple[QueuedItem[Admission[K, T, R], T], R | Exception]]] = {}
    for item, outcome in zip(batch, outcomes, strict=True):
        by_request.setdefault(item.client, []).append((item, outcome))
    return [
        (
            admission,
            BatchSlice(
                indices=tuple(item.index for item, _ in pairs),
                outcomes=tuple(outcome for _, outcome in pairs),
                queue_s=started - min(item.arrival for item, _ in pairs),
                run_s=run_s,
                batch_size=len(batch),
            ),
        )
        for admission, pairs in by_request.items()
    ]


def _unread(slices: "asyncio.Queue[BatchSlice[R]]") -> int:
    """Empties a queue of slices and returns the number of their items."""
    count = 0
    while not slices.empty():
        count += len(slices.get_nowait().indices)
    return count

"""Turns on the CPU and room for decoded pictures: people at screens first, bulk work aged so that it never starves.

    CpuPool     threads; a step that waits is taken by rank, not by arrival
    Room        bytes; whoever would exceed them waits for those who hold some

A step's rank is the time at which it was submitted, `patience_s` later for BATCH: bulk work that waited so long goes
ahead of people who came later. (Not so in the batcher, where it is owed a part: what passes a person there is a batch.)
Threads cannot be stopped, so long work comes in steps of some milliseconds; between them whoever ranks first gets the
thread. Bulk work never holds the last thread of several, nor more than half of the room. Knows nothing of images,
models or gRPC.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, Generic, TypeVar

from mal_server.scheduling.priority import Priority

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Step(Generic[Result]):
    rank: float
    future: "Future[Result]"
    work: Callable[[], Result]

    def run(self) -> None:
        try:
            self.future.set_result(self.work())
        # As any executor: what the work raises belongs to whoever waits for it.
        except BaseException as error:
            self.future.set_exception(error)


class PriorityThreadPool:
    """Threads for steps of CPU work.

    Args:
        threads: how many.
        patience_s: how much later than it was submitted a BATCH step counts.
        clock: seconds, rising.
    """

    def __init__(self, threads: int, *, patience_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.threads = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="cpu")
        self._patience_s = {Priority.INTERACTIVE: 0.0, Priority.BATCH: patience_s}
        self._clock = clock
        self._waiting: dict[Priority, deque[_Step[Any]]] = {priority: deque() for priority in Priority}
        self._batch_at_once = max(threads - 1, 1)
        self._batch_running = 0
        self._is_closed = False
        self._lock = Lock()

    def submit(self, priority: Priority, work: Callable[..., Result], *args: Any) -> "Future[Result]":
        """Runs `work(*args)` when its turn comes. A future that is cancelled before that is skipped."""
        future: Future[Result] = Future()
        with self._lock:
            rank = self._clock() + self._patience_s[priority]
            self._waiting[priority].append(_Step(rank, future, partial(work, *args)))
        # Not this step: a thread that is free takes whichever ranks first then.
        self._threads.submit(self._take)
        return future

    async def run(self, priority: Priority, work: Callable[..., Result], *args: Any) -> Result:
        """The same, awaited; a caller that is cancelled takes back what has not begun."""
        return await asyncio.wrap_future(self.submit(priority, work, *args))

    def shutdown(self) -> None:
        """Cancels what waits; the threads end after their steps."""
        with self._lock:
            self._is_closed = True
            left = [step for queue in self._waiting.values() for step in queue]
            for queue in self._waiting.values():
                queue.clear()
        for step in left:
            step.future.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> None:
        found = self._next()
        if found is None:
            return
        priority, step = found
        step.run()
        if priority is Priority.BATCH:
            self._batch_ended()

    def _next(self) -> tuple[Priority, _Step[Any]] | None:
        with self._lock:
            while heads := [(queue[0].rank, at, p) for at, (p, queue) in enumerate(self._waiting.items()) if queue]:
                if self._batch_running >= self._batch_at_once:
                    heads = [head for head in heads if head[2] is not Priority.BATCH]
                    if not heads:
                        return None  # `_batch_ended` sends a thread for it
                priority = min(heads)[2]
                step = self._waiting[priority].popleft()
                if step.future.set_running_or_notify_cancel():
                    self._batch_running += priority is Priority.BATCH
                    return priority, step
        return None

    def _batch_ended(self) -> None:
        with self._lock:
            self._batch_running -= 1
            if self._waiting[Priority.BATCH] and not self._is_closed:
                self._threads.submit(self._take)


class MemoryLease:
    """Some bytes of a `MemoryLimiter`."""

    def __init__(self, room: "MemoryLimiter", priority: Priority, size: int) -> None:
        self._room = room
        self._priority = priority
        self._size = size

    def shrink(self, size: int) -> None:
        """Keeps only so many; never more than before."""
        less = max(self._size - size, 0)
        self._size -= less
        self._room.give_back(self._priority, less)

    def give_back(self) -> None:
        """Keeps nothing."""
        self.shrink(0)


@dataclass(frozen=True, slots=True)
class _Waiter:
    rank: float
    size: int
    granted: "asyncio.Future[None]"


class MemoryLimiter:
    """Bytes that may be held at a time, on one event loop.

    A request that is larger than all of it, or than what BATCH may hold, is granted when nothing else (of BATCH) is.

    Args:
        size: all bytes; BATCH holds at most half of them.
        patience_s: as for `PriorityThreadPool`.
    """

    def __init__(self, size: int, *, patience_s: float = 0.0) -> None:
        self._limits = {Priority.INTERACTIVE: size, Priority.BATCH: size // 2}
        self._size = size
        self._patience_s = {Priority.INTERACTIVE: 0.0, Priority.BATCH: patience_s}
        self._held = dict.fromkeys(Priority, 0)
        self._waiting: dict[Priority, deque[_Waiter]] = {priority: deque() for priority in Priority}

    @property
    def held(self) -> int:
        """Bytes held now."""
        return sum(self._held.values())

    async def take(self, size: int, priority: Priority) -> MemoryLease:
        """Waits for its turn; what it returns must be given back."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.time() + self._patience_s[priority], size, loop.create_future())
        self._waiting[priority].append(waiter)
        self._grant()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled():
                self.give_back(priority, size)  # granted in the very moment
            else:
                self._waiting[priority].remove(waiter)
                self._grant()  # it may have stood before others
            raise
        return MemoryLease(self, priority, size)

    def give_back(self, priority: Priority, size: int) -> None:
        """Bytes are free again."""
        self._held[priority] -= size
        self._grant()

    def _grant(self) -> None:
        while (waiter := self._first()) is not None:
            priority, one = waiter
            self._waiting[priority].popleft()
            self._held[priority] += one.size
            one.granted.set_result(None)

    def _first(self) -> tuple[Priority, _Waiter] | None:
        """Who may go on now. Nobody passes the first by rank, but BATCH may have to wait for its own share."""
        heads = [(queue[0].rank, at, p) for at, (p, queue) in enumerate(self._waiting.items()) if queue]
        for _, _, priority in sorted(heads):
            one, own = self._waiting[priority][0], self._held[priority]
            if own and own + one.size > self._limits[priority]:
                if priority is Priority.BATCH:
                    continue
                return None
            if self.held and self.held + one.size > self._size:
                return None
            return priority, one
        return None

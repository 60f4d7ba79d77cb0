"""Bounds the memory of short tasks: a task that would exceed the limit waits for others to release theirs.

The priority whose oldest task arrived first goes first; BATCH tasks count as arriving `batch_aging_s` later and hold at
most half of the memory. Within a priority, callers take turns. `MemoryQuota` is for memory that is held for minutes: it
refuses instead.
"""

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass

from mal_server.scheduling.priority import Priority
from mal_server.scheduling.turns import TurnQueue


class MemoryLease:
    """Bytes that one task holds of a `MemoryLimiter`."""

    def __init__(self, limiter: "MemoryLimiter", priority: Priority, size: int) -> None:
        self._limiter = limiter
        self._priority = priority
        self._size = size

    def shrink(self, size: int) -> None:
        """Releases all but `size` bytes; never acquires more. Raises ValueError for fewer than 0."""
        if size < 0:
            raise ValueError(f"{size} bytes; it must be 0 or more")
        excess = max(self._size - size, 0)
        self._size -= excess
        self._limiter.release(self._priority, excess)

    def release(self) -> None:
        """Releases all bytes; further calls have no effect."""
        self.shrink(0)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    priority: Priority
    effective_arrival: float
    size: int
    granted: "asyncio.Future[None]"


class MemoryLimiter:
    """Bytes that tasks may hold together; used from one event loop.

    A task that needs more than the limit, or more than BATCH may hold, runs when no other (BATCH) task holds any.

    Args:
        limit: bytes; BATCH holds at most half of them.
        batch_aging_s: time by which BATCH tasks count as arriving later.
    """

    def __init__(self, limit: int, *, batch_aging_s: float = 0.0) -> None:
        self._limit = limit
        self._batch_limit = limit // 2
        self._aging_s = {Priority.INTERACTIVE: 0.0, Priority.BATCH: batch_aging_s}
        self._used = dict.fromkeys(Priority, 0)
        self._waiting: dict[Priority, TurnQueue[_Waiter]] = {priority: TurnQueue() for priority in Priority}

    @property
    def used(self) -> int:
        """Bytes held now."""
        return sum(self._used.values())

    async def acquire(self, size: int, priority: Priority, caller: Hashable = "") -> MemoryLease:
        """Waits until `size` bytes are free; the caller must release the lease."""
        loop = asyncio.get_running_loop()
        waiter = _Waiter(priority, loop.time() + self._aging_s[priority], size, loop.create_future())
        self._waiting[priority].add(waiter, caller)
        self._grant()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled():
                self.release(priority, size)  # granted in the same iteration of the loop
            else:
                self._waiting[priority].remove(waiter)
                self._grant()  # others may have waited behind it
            raise
        return MemoryLease(self, priority, size)

    def release(self, priority: Priority, size: int) -> None:
        """Frees bytes and grants them to waiting tasks; called by leases."""
        self._used[priority] -= size
        self._grant()

    def _grant(self) -> None:
        while (waiter := self._next_waiter()) is not None:
            self._waiting[waiter.priority].pop()
            if waiter.granted.done():  # cancelled, and its task has not noticed yet
                continue
            self._used[waiter.priority] += waiter.size
            waiter.granted.set_result(None)

    def _next_waiter(self) -> _Waiter | None:
        """Returns the waiter that may start now: the first one, or the one behind if BATCH has used up its half."""
        queues = [queue for queue in self._waiting.values() if queue]
        for queue in sorted(queues, key=lambda queue: queue.oldest().effective_arrival):
            waiter = queue.first()
            is_batch = waiter.priority is Priority.BATCH
            if is_batch and not _fits(waiter.size, self._used[Priority.BATCH], self._batch_limit):
                continue
            return waiter if _fits(waiter.size, self.used, self._limit) else None
        return None


def _fits(size: int, used: int, limit: int) -> bool:
    return used == 0 or used + size <= limit

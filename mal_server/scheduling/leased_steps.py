"""Long CPU work as steps on the pool that hold memory together, from before the first to after the last."""

import asyncio
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from mal_server.scheduling.background import when_done
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.memory_limiter import MemoryLease, MemoryLimiter
from mal_server.scheduling.priority import Priority

Result = TypeVar("Result")


class LeasedSteps:
    """Runs one step at a time; an asynchronous context manager that waits for the memory and releases it.

    Args:
        pool: runs the steps.
        limiter: holds the memory.
        priority: priority in both.
        caller: callers take turns in both.
        size_bytes: memory of all steps; 0 waits for nobody.

    Attributes:
        cpu_s: seconds that the steps have taken so far.
    """

    def __init__(
        self, pool: PriorityThreadPool, limiter: MemoryLimiter, priority: Priority, caller: Hashable, size_bytes: int
    ) -> None:
        self.cpu_s = 0.0
        self._pool = pool
        self._limiter = limiter
        self._priority = priority
        self._caller = caller
        self._size_bytes = size_bytes
        self._lease: MemoryLease | None = None
        self._step: Future[Any] | None = None

    async def __aenter__(self) -> Self:
        if self._size_bytes:
            self._lease = await self._limiter.acquire(self._size_bytes, self._priority, self._caller)
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lease is not None:
            # A cancelled caller leaves while a thread still uses the memory.
            when_done(self._step, self._lease.release)

    async def run(self, work: Callable[..., Result], *args: Any) -> Result:
        """Runs `work(*args)` on the pool. Raises what it raises."""
        step = self._pool.submit(self._priority, timed, work, *args, caller=self._caller)
        self._step = step
        result: Result
        result, seconds = await asyncio.wrap_future(step)
        self.cpu_s += seconds
        return result

    def shrink(self, size_bytes: int) -> None:
        """Releases all but `size_bytes` of the memory."""
        if self._lease is not None:
            self._lease.shrink(size_bytes)


def timed(work: Callable[..., Result], *args: Any) -> tuple[Result, float]:
    """Returns the result of `work(*args)` and the seconds that it took."""
    started = time.perf_counter()
    result = work(*args)
    return result, time.perf_counter() - started

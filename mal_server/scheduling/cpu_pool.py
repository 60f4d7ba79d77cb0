"""Threads for CPU work that run the waiting tasks by priority. Knows nothing of images, models or gRPC.

Tasks start in order of their submission time; BATCH tasks count as submitted `batch_aging_s` later. So INTERACTIVE
tasks go first, and a BATCH task that has waited that long goes ahead of newer ones. Unlike in the batcher, passing
costs a few milliseconds at most, so no quarter is guaranteed.

A running thread cannot be interrupted: callers split long work into tasks of some milliseconds. BATCH tasks never
occupy the last of several threads.
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
class _Task(Generic[Result]):
    priority: Priority
    effective_start: float
    future: "Future[Result]"
    work: Callable[[], Result]

    def run(self) -> None:
        try:
            self.future.set_result(self.work())
        # As in any executor: what the work raises belongs to the caller that awaits it.
        except BaseException as error:
            self.future.set_exception(error)


class PriorityThreadPool:
    """Runs CPU tasks by priority.

    Args:
        threads: number of threads.
        batch_aging_s: time by which BATCH tasks count as submitted later.
        clock: monotonic seconds.
    """

    def __init__(
        self, threads: int, *, batch_aging_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="cpu")
        self._aging_s = {Priority.INTERACTIVE: 0.0, Priority.BATCH: batch_aging_s}
        self._clock = clock
        self._waiting: dict[Priority, deque[_Task[Any]]] = {priority: deque() for priority in Priority}
        self._max_batch_running = max(threads - 1, 1)
        self._batch_running = 0
        self._is_closed = False
        self._lock = Lock()

    def submit(self, priority: Priority, work: Callable[..., Result], *args: Any) -> "Future[Result]":
        """Schedules `work(*args)`. A future that is cancelled before its task starts is skipped."""
        future: Future[Result] = Future()
        with self._lock:
            start = self._clock() + self._aging_s[priority]
            self._waiting[priority].append(_Task(priority, start, future, partial(work, *args)))
        # Not this task: a free thread runs the one that goes first by then.
        self._executor.submit(self._run_next)
        return future

    async def run(self, priority: Priority, work: Callable[..., Result], *args: Any) -> Result:
        """Schedules `work(*args)` and awaits it; cancelling the caller removes a task that has not started."""
        return await asyncio.wrap_future(self.submit(priority, work, *args))

    def shutdown(self) -> None:
        """Cancels the waiting tasks; each thread ends after its running one."""
        with self._lock:
            self._is_closed = True
            waiting = [task for queue in self._waiting.values() for task in queue]
            for queue in self._waiting.values():
                queue.clear()
        for task in waiting:
            task.future.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run_next(self) -> None:
        task = self._pop()
        if task is None:
            return
        task.run()
        if task.priority is Priority.BATCH:
            self._end_batch_task()

    def _pop(self) -> _Task[Any] | None:
        """Removes and returns the task that goes first, marked as running; None if none may start."""
        with self._lock:
            while (task := self._first()) is not None:
                self._waiting[task.priority].popleft()
                if task.future.set_running_or_notify_cancel():
                    self._batch_running += task.priority is Priority.BATCH
                    return task
        return None

    def _first(self) -> _Task[Any] | None:
        heads = [queue[0] for queue in self._waiting.values() if queue]
        if self._batch_running >= self._max_batch_running:  # `_end_batch_task` wakes a thread for the others
            heads = [task for task in heads if task.priority is not Priority.BATCH]
        return min(heads, key=lambda task: task.effective_start, default=None)

    def _end_batch_task(self) -> None:
        with self._lock:
            self._batch_running -= 1
            if self._waiting[Priority.BATCH] and not self._is_closed:
                self._executor.submit(self._run_next)

"""Threads for CPU work that run the waiting tasks by priority. Knows nothing of images, models or gRPC.

The priority whose oldest task was submitted first goes first; BATCH tasks count as submitted `batch_aging_s` later. So
INTERACTIVE tasks go first, and after BATCH ones have waited that long, they go ahead of newer ones. Unlike in the
batcher, passing costs a few milliseconds at most, so no quarter is guaranteed. Within a priority, callers take turns.

A running thread cannot be interrupted: callers split long work into tasks of some milliseconds. BATCH tasks never
occupy the last of several threads.
"""

import asyncio
import time
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Condition, Thread
from typing import Any, Generic, TypeVar

from mal_server.scheduling.background import CPU_THREAD_PREFIX
from mal_server.scheduling.priority import Priority
from mal_server.scheduling.turns import TurnQueue

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
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

    The threads are daemons of our own: the interpreter joins those of a `ThreadPoolExecutor`, so a long task would hold
    up the end of the process. A process with this pool ends by `exit_process`.

    Args:
        threads: number of threads.
        batch_aging_s: time by which BATCH tasks count as submitted later.
        clock: monotonic seconds.
    """

    def __init__(
        self, threads: int, *, batch_aging_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.threads = threads
        self._aging_s = {Priority.INTERACTIVE: 0.0, Priority.BATCH: batch_aging_s}
        self._clock = clock
        # A cancelled task is removed at once, with all that it refers to.
        self._waiting: dict[Priority, TurnQueue[_Task[Any]]] = {priority: TurnQueue() for priority in Priority}
        self._max_batch_running = max(threads - 1, 1)
        self._batch_running = 0
        self._is_closed = False
        self._changed = Condition()
        self._is_started = False

    def submit(
        self, priority: Priority, work: Callable[..., Result], *args: Any, caller: Hashable = ""
    ) -> "Future[Result]":
        """Schedules `work(*args)`. Cancelling the future before its task starts drops the task and its arguments."""
        future: Future[Result] = Future()
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the pool is shut down")
            self._start_threads()
            start = self._clock() + self._aging_s[priority]
            task = _Task(priority, start, future, partial(work, *args))
            self._waiting[priority].add(task, caller)
            # Any thread: it runs the task that goes first by then.
            self._changed.notify()
        future.add_done_callback(partial(self._forget_cancelled, priority, weakref.ref(task)))
        return future

    async def run(self, priority: Priority, work: Callable[..., Result], *args: Any, caller: Hashable = "") -> Result:
        """Schedules `work(*args)` and awaits it; cancelling the caller removes a task that has not started."""
        return await asyncio.wrap_future(self.submit(priority, work, *args, caller=caller))

    def shutdown(self) -> None:
        """Cancels the waiting tasks; each thread ends after its running one."""
        with self._changed:
            self._is_closed = True
            waiting = [queue.pop().future for queue in self._waiting.values() for _ in range(len(queue))]
            self._changed.notify_all()
        for future in waiting:
            future.cancel()

    def _start_threads(self) -> None:
        """Starts the threads for the first task: a server that cannot start leaves none behind."""
        if self._is_started:
            return
        self._is_started = True
        for number in range(self.threads):
            Thread(target=self._run_tasks, name=f"{CPU_THREAD_PREFIX}{number}", daemon=True).start()

    def _forget_cancelled(self, priority: Priority, task: "weakref.ref[_Task[Any]]", future: "Future[Any]") -> None:
        waiting = task() if future.cancelled() else None
        if waiting is not None:
            with self._changed:
                self._waiting[priority].remove(waiting)

    def _run_tasks(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Waits for a task and runs it; returns False after shutdown. Its locals, and so the result, end with it."""
        task = self._pop()
        if task is None:
            return False
        task.run()
        if task.priority is Priority.BATCH:
            self._end_batch_task()
        return True

    def _pop(self) -> _Task[Any] | None:
        """Waits for the task that goes first, removes it and marks it as running; returns None after shutdown."""
        with self._changed:
            while not self._is_closed:
                task = self._first()
                if task is None:
                    self._changed.wait()
                    continue
                self._waiting[task.priority].pop()
                if task.future.set_running_or_notify_cancel():
                    self._batch_running += task.priority is Priority.BATCH
                    return task
        return None

    def _first(self) -> _Task[Any] | None:
        queues = [queue for queue in self._waiting.values() if queue]
        if self._batch_running >= self._max_batch_running:  # `_end_batch_task` wakes a thread for the others
            queues = [queue for queue in queues if queue is not self._waiting[Priority.BATCH]]
        queue = min(queues, key=lambda queue: queue.oldest().effective_start, default=None)
        return None if queue is None else queue.first()

    def _end_batch_task(self) -> None:
        with self._changed:
            self._batch_running -= 1
            self._changed.notify()

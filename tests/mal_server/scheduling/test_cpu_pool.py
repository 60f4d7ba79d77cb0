"""The CPU thread pool on a fake clock: the order of tasks, and the thread that BATCH never occupies."""

import asyncio
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.priority import Priority

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH
LIMIT_S = 20


class BlockedPool:
    """A pool whose threads are occupied until `unblock`, a clock that tests set, and the order of tasks that ran."""

    def __init__(self, threads: int, batch_aging_s: float) -> None:
        self.now = 0.0
        self.ran: list[str] = []
        self.pool = PriorityThreadPool(threads, batch_aging_s=batch_aging_s, clock=lambda: self.now)
        self._gate = threading.Event()
        started = [threading.Event() for _ in range(threads)]
        for event in started:
            self.pool.submit(INTERACTIVE, self._block, event)
        assert all(event.wait(LIMIT_S) for event in started)

    def submit(self, name: str, priority: Priority, at: float) -> "Future[None]":
        """Submits a task at a time of the clock."""
        self.now = at
        return self.pool.submit(priority, self.ran.append, name)

    def unblock(self, *tasks: "Future[Any]") -> list[str]:
        """Frees the threads, waits for the tasks and returns the names of all that ran, in order."""
        self._gate.set()
        for task in tasks:
            task.result(LIMIT_S)
        return self.ran

    def _block(self, started: threading.Event) -> None:
        started.set()
        self._gate.wait(LIMIT_S)


@contextmanager
def blocked_pool(threads: int = 1, batch_aging_s: float = 2.0) -> Iterator[BlockedPool]:
    blocked = BlockedPool(threads, batch_aging_s)
    try:
        yield blocked
    finally:
        blocked.unblock()
        blocked.pool.shutdown()


def test_an_interactive_task_passes_earlier_batch_tasks() -> None:
    with blocked_pool() as pool:
        tasks = [pool.submit(f"batch {n}", BATCH, 0.0) for n in range(3)]
        tasks.append(pool.submit("interactive", INTERACTIVE, 1.9))
        assert pool.unblock(*tasks) == ["interactive", "batch 0", "batch 1", "batch 2"]


def test_an_aged_batch_task_runs_before_later_interactive_ones() -> None:
    with blocked_pool() as pool:
        tasks = [
            pool.submit("batch", BATCH, 0.0),
            pool.submit("early", INTERACTIVE, 1.0),
            pool.submit("late", INTERACTIVE, 2.1),
        ]
        assert pool.unblock(*tasks) == ["early", "batch", "late"]


def test_tasks_of_one_priority_run_in_order_of_submission() -> None:
    with blocked_pool() as pool:
        tasks = [pool.submit(str(n), INTERACTIVE, 0.0) for n in range(5)]
        assert pool.unblock(*tasks) == list("01234")


def test_a_cancelled_task_never_runs() -> None:
    with blocked_pool() as pool:
        cancelled, kept = pool.submit("cancelled", INTERACTIVE, 0.0), pool.submit("kept", BATCH, 0.0)
        assert cancelled.cancel()
        assert pool.unblock(kept) == ["kept"]


class Content:
    """Stands for the content of an image; weakly referable."""

    def keep(self) -> "Content":
        return self


def test_a_cancelled_task_keeps_neither_its_arguments_nor_an_entry_while_the_threads_are_busy() -> None:
    with blocked_pool() as pool:
        content = Content()
        task = pool.pool.submit(INTERACTIVE, content.keep)
        kept: list[weakref.ref[Any]] = [weakref.ref(content), weakref.ref(task)]
        task.cancel()
        del content, task
        assert [reference() for reference in kept] == [None, None]


def test_a_cancelled_caller_leaves_nothing_in_the_pool() -> None:
    async def work(pool: BlockedPool) -> "weakref.ref[Content]":
        content = Content()
        caller = asyncio.ensure_future(pool.pool.run(INTERACTIVE, content.keep))
        await asyncio.sleep(0)
        caller.cancel()
        await asyncio.wait([caller])
        return weakref.ref(content)

    with blocked_pool() as pool:
        assert asyncio.run(work(pool))() is None


def test_an_idle_thread_keeps_nothing_of_its_last_task() -> None:
    with blocked_pool() as pool:
        content = Content()
        task = pool.pool.submit(INTERACTIVE, content.keep)
        kept = weakref.ref(content)
        pool.unblock(task)
        # The only thread has left the first task once it has run another one.
        pool.pool.submit(INTERACTIVE, int).result(LIMIT_S)
        del content, task
        assert kept() is None


def test_an_exception_of_a_task_reaches_its_caller_and_the_thread_survives() -> None:
    def fails() -> None:
        raise ValueError("no")

    with blocked_pool() as pool:
        bad, good = pool.pool.submit(BATCH, fails), pool.submit("good", BATCH, 0.0)
        pool.unblock(good)
        with pytest.raises(ValueError, match="no"):
            bad.result(LIMIT_S)


def test_batch_tasks_never_occupy_the_last_of_several_threads() -> None:
    """Two of three blocking BATCH tasks start on three threads; an INTERACTIVE task then runs at once."""
    gate, started = threading.Event(), [threading.Event() for _ in range(3)]

    def block(number: int) -> None:
        started[number].set()
        gate.wait(LIMIT_S)

    pool = PriorityThreadPool(3)
    try:
        tasks = [pool.submit(BATCH, block, number) for number in range(3)]
        assert all(event.wait(LIMIT_S) for event in started[:2])
        assert pool.submit(INTERACTIVE, lambda: "ran").result(LIMIT_S) == "ran"
        assert not started[2].is_set()
        gate.set()
        for task in tasks:
            task.result(LIMIT_S)
    finally:
        gate.set()
        pool.shutdown()


def test_shutdown_cancels_waiting_tasks() -> None:
    with blocked_pool() as pool:
        task = pool.submit("never", INTERACTIVE, 0.0)
        pool.pool.shutdown()
        assert task.cancelled()
        with pytest.raises(RuntimeError):
            pool.submit("never", INTERACTIVE, 0.0)


def test_a_pool_without_tasks_starts_no_thread() -> None:
    before = threading.active_count()
    PriorityThreadPool(3)
    assert threading.active_count() <= before

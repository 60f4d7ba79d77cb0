"""The memory limiter on a fake clock: grants in order, the half that BATCH may hold, and cancelled waiters."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from mal_server.scheduling.memory_limiter import MemoryLease, MemoryLimiter
from mal_server.scheduling.priority import Priority
from tests.mal_server.fakes import run_on_fake_clock

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH


class Tasks:
    """Tasks that acquire memory; `granted` lists their leases by name, in order of the grants."""

    def __init__(self, limiter: MemoryLimiter) -> None:
        self.limiter = limiter
        self.granted: dict[str, MemoryLease] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def acquire(self, name: str, size: int, priority: Priority, after_s: float = 0.0, caller: str = "") -> None:
        await asyncio.sleep(after_s)
        self.tasks[name] = asyncio.create_task(self._acquire(name, size, priority, caller))
        await asyncio.sleep(0)

    async def shrink(self, name: str, size: int = 0) -> list[str]:
        """Shrinks a lease; returns the names of all granted so far."""
        self.granted[name].shrink(size)
        return await self.settled()

    async def cancel(self, name: str) -> list[str]:
        """Cancels a task; returns the names of all granted so far."""
        self.tasks[name].cancel()
        return await self.settled()

    async def settled(self) -> list[str]:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return list(self.granted)

    async def _acquire(self, name: str, size: int, priority: Priority, caller: str) -> None:
        self.granted[name] = await self.limiter.acquire(size, priority, caller)


def with_limit(limit: int, work: Callable[[Tasks], Any], batch_aging_s: float = 2.0) -> None:
    """Runs `work`, then releases every lease and asserts that no byte is held."""

    async def run() -> None:
        tasks = Tasks(MemoryLimiter(limit, batch_aging_s=batch_aging_s))
        await work(tasks)
        for name in [*tasks.tasks, *tasks.tasks]:  # twice: the first round grants what still waits
            if name in tasks.granted:
                await tasks.shrink(name)
        assert tasks.limiter.used == 0

    run_on_fake_clock(run())


def test_no_more_than_the_limit_is_held() -> None:
    async def work(tasks: Tasks) -> None:
        for name in "abc":
            await tasks.acquire(name, 40, INTERACTIVE)
        assert (list(tasks.granted), tasks.limiter.used) == (["a", "b"], 80)
        assert await tasks.shrink("a") == ["a", "b", "c"]

    with_limit(100, work)


def test_a_shrunken_lease_lets_the_next_task_start() -> None:
    async def work(tasks: Tasks) -> None:
        await tasks.acquire("a", 80, INTERACTIVE)
        await tasks.acquire("b", 60, INTERACTIVE)
        assert await tasks.shrink("a", 50) == ["a"]
        assert await tasks.shrink("a", 40) == ["a", "b"]
        assert tasks.limiter.used == 100

    with_limit(100, work)


def test_a_lease_never_releases_more_than_it_holds() -> None:
    async def work(tasks: Tasks) -> None:
        await tasks.acquire("a", 60, INTERACTIVE)
        with pytest.raises(ValueError, match="-1"):
            await tasks.shrink("a", -1)
        assert tasks.limiter.used == 60

    with_limit(100, work)


def test_batch_holds_at_most_half_so_interactive_tasks_need_not_wait_for_it() -> None:
    async def work(tasks: Tasks) -> None:
        for name in ("batch 0", "batch 1"):
            await tasks.acquire(name, 40, BATCH)
        await tasks.acquire("interactive", 50, INTERACTIVE)
        assert list(tasks.granted) == ["batch 0", "interactive"]

    with_limit(100, work)


def test_an_interactive_task_passes_a_waiting_batch_task_until_that_has_aged() -> None:
    async def work(tasks: Tasks, later_s: float, first: str) -> None:
        await tasks.acquire("holder", 100, INTERACTIVE)
        await tasks.acquire("batch", 30, BATCH)
        await tasks.acquire("interactive", 80, INTERACTIVE, after_s=later_s)
        assert await tasks.shrink("holder") == ["holder", first]

    with_limit(100, lambda tasks: work(tasks, 1.0, "interactive"))
    with_limit(100, lambda tasks: work(tasks, 3.0, "batch"))


def test_a_task_larger_than_the_limit_runs_alone() -> None:
    async def work(tasks: Tasks) -> None:
        await tasks.acquire("small", 10, INTERACTIVE)
        await tasks.acquire("huge", 300, INTERACTIVE)
        await tasks.acquire("next", 10, INTERACTIVE)
        assert list(tasks.granted) == ["small"]
        assert await tasks.shrink("small") == ["small", "huge"]
        assert await tasks.shrink("huge") == ["small", "huge", "next"]

    with_limit(100, work)


def test_a_cancelled_waiter_unblocks_those_behind_it() -> None:
    async def work(tasks: Tasks) -> None:
        await tasks.acquire("a", 60, INTERACTIVE)
        await tasks.acquire("large", 90, INTERACTIVE)
        await tasks.acquire("small", 30, INTERACTIVE)
        assert await tasks.cancel("large") == ["a", "small"]

    with_limit(100, work)


def test_memory_released_by_one_of_several_cancelled_tasks_is_granted_to_none_of_them() -> None:
    async def work(tasks: Tasks) -> None:
        await tasks.acquire("a", 100, INTERACTIVE)
        for name in "bcd":
            await tasks.acquire(name, 100, INTERACTIVE)
        tasks.tasks["b"].cancel()
        tasks.tasks["c"].cancel()
        assert await tasks.shrink("a") == ["a", "d"]
        assert tasks.limiter.used == 100

    with_limit(100, work)


def test_memory_granted_to_a_task_that_is_cancelled_at_that_moment_is_released() -> None:
    async def work(tasks: Tasks) -> None:
        await tasks.acquire("a", 100, INTERACTIVE)
        await tasks.acquire("b", 50, INTERACTIVE)
        tasks.granted["a"].release()
        assert await tasks.cancel("b") == ["a"]
        assert tasks.limiter.used == 0

    with_limit(100, work)


def test_a_task_waits_for_one_of_each_other_caller() -> None:
    async def work(tasks: Tasks) -> None:
        for name in ("a1", "a2", "a3", "a4"):
            await tasks.acquire(name, 100, INTERACTIVE, caller="a")
        await tasks.acquire("b1", 100, INTERACTIVE, caller="b")
        for name, order in (("a1", ["a2"]), ("a2", ["a2", "b1"]), ("b1", ["a2", "b1", "a3"])):
            assert (await tasks.shrink(name))[1:] == order
        for name in ("a3", "a4"):
            await tasks.shrink(name)

    with_limit(100, work)

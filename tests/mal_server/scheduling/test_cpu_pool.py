"""Turns on the CPU and room for pixels: who goes first, who waits, and what is given back. Nothing here waits."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from mal_server.scheduling.cpu_pool import MemoryLease, MemoryLimiter, PriorityThreadPool
from mal_server.scheduling.priority import Priority
from tests.mal_server.fakes import run_in_no_time

PERSON, BULK = Priority.INTERACTIVE, Priority.BATCH
LIMIT_S = 20


class Stage:
    """A pool whose threads are all held up, a clock that stands, and the order in which steps ran."""

    def __init__(self, threads: int, patience_s: float) -> None:
        self.now = 0.0
        self.ran: list[str] = []
        self.pool = PriorityThreadPool(threads, patience_s=patience_s, clock=lambda: self.now)
        self._go = threading.Event()
        begun = [threading.Event() for _ in range(threads)]
        self._held = [self.pool.submit(PERSON, self._hold, event) for event in begun]
        assert all(event.wait(LIMIT_S) for event in begun)

    def asks(self, name: str, priority: Priority, at: float) -> "Future[None]":
        """Submits a step at a time of the clock."""
        self.now = at
        return self.pool.submit(priority, self.ran.append, name)

    def let_go(self, *steps: "Future[Any]") -> list[str]:
        """Frees the threads; the order of what ran once those steps are done."""
        self._go.set()
        for step in steps:
            step.result(LIMIT_S)
        return self.ran

    def _hold(self, begun: threading.Event) -> None:
        begun.set()
        self._go.wait(LIMIT_S)


@contextmanager
def stage(threads: int = 1, patience_s: float = 2.0) -> Iterator[Stage]:
    made = Stage(threads, patience_s)
    try:
        yield made
    finally:
        made.let_go()
        made.pool.shutdown()


def test_a_persons_step_passes_bulk_steps_that_came_before() -> None:
    with stage() as pool:
        steps = [pool.asks(f"bulk {n}", BULK, 0.0) for n in range(3)] + [pool.asks("person", PERSON, 1.9)]
        assert pool.let_go(*steps) == ["person", "bulk 0", "bulk 1", "bulk 2"]


def test_a_bulk_step_that_waited_out_its_patience_goes_before_later_ones() -> None:
    with stage() as pool:
        steps = [pool.asks("bulk", BULK, 0.0), pool.asks("early", PERSON, 1.0), pool.asks("late", PERSON, 2.1)]
        assert pool.let_go(*steps) == ["early", "bulk", "late"]


def test_steps_of_one_priority_run_in_their_order() -> None:
    with stage() as pool:
        steps = [pool.asks(str(n), PERSON, 0.0) for n in range(5)]
        assert pool.let_go(*steps) == list("01234")


def test_a_cancelled_step_never_runs() -> None:
    with stage() as pool:
        gone, stays = pool.asks("gone", PERSON, 0.0), pool.asks("stays", BULK, 0.0)
        assert gone.cancel()
        assert pool.let_go(stays) == ["stays"]


def test_what_a_step_raises_reaches_its_caller_and_the_thread_goes_on() -> None:
    def fails() -> None:
        raise ValueError("no")

    with stage() as pool:
        bad, good = pool.pool.submit(BULK, fails), pool.asks("good", BULK, 0.0)
        pool.let_go(good)
        with pytest.raises(ValueError, match="no"):
            bad.result(LIMIT_S)


def test_bulk_steps_leave_the_last_of_several_threads_to_people() -> None:
    """Three bulk steps that end only when told fill two of three threads; the third one waits, a person does not."""
    go, begun = threading.Event(), [threading.Event() for _ in range(3)]

    def holds(number: int) -> None:
        begun[number].set()
        go.wait(LIMIT_S)

    pool = PriorityThreadPool(3)
    try:
        bulk = [pool.submit(BULK, holds, number) for number in range(3)]
        assert all(event.wait(LIMIT_S) for event in begun[:2])
        assert pool.submit(PERSON, lambda: "here").result(LIMIT_S) == "here"
        assert not begun[2].is_set()
        go.set()
        for step in bulk:
            step.result(LIMIT_S)
    finally:
        go.set()
        pool.shutdown()


def test_shutting_down_cancels_what_waits() -> None:
    with stage() as pool:
        step = pool.asks("never", PERSON, 0.0)
        pool.pool.shutdown()
        assert step.cancelled()


class Asker:
    """Takes room in tasks; tells who got it, in which order."""

    def __init__(self, room: MemoryLimiter) -> None:
        self.room = room
        self.got: dict[str, MemoryLease] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def asks(self, name: str, size: int, priority: Priority, after_s: float = 0.0) -> None:
        await asyncio.sleep(after_s)
        self.tasks[name] = asyncio.create_task(self._take(name, size, priority))
        await asyncio.sleep(0)

    async def gives(self, name: str, keeps: int = 0) -> list[str]:
        self.got[name].shrink(keeps)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return list(self.got)

    async def _take(self, name: str, size: int, priority: Priority) -> None:
        self.got[name] = await self.room.take(size, priority)


def with_room(size: int, work: Callable[[Asker], Any], patience_s: float = 2.0) -> None:
    async def run() -> None:
        asker = Asker(MemoryLimiter(size, patience_s=patience_s))
        await work(asker)
        for name in [*asker.tasks, *asker.tasks]:
            if name in asker.got:  # whoever still waits gets its turn by this
                await asker.gives(name)
        assert asker.room.held == 0

    run_in_no_time(run())


def test_no_more_is_held_than_there_is_room_for() -> None:
    async def work(asker: Asker) -> None:
        for name in "abc":
            await asker.asks(name, 40, PERSON)
        assert (list(asker.got), asker.room.held) == (["a", "b"], 80)
        assert await asker.gives("a") == ["a", "b", "c"]

    with_room(100, work)


def test_shrinking_makes_room() -> None:
    async def work(asker: Asker) -> None:
        await asker.asks("a", 80, PERSON)
        await asker.asks("b", 60, PERSON)
        assert await asker.gives("a", keeps=50) == ["a"]
        assert await asker.gives("a", keeps=40) == ["a", "b"]
        assert asker.room.held == 100

    with_room(100, work)


def test_bulk_holds_half_so_that_a_person_need_not_wait_for_it() -> None:
    async def work(asker: Asker) -> None:
        for name in ("bulk 0", "bulk 1"):
            await asker.asks(name, 40, BULK)
        await asker.asks("person", 50, PERSON)
        assert list(asker.got) == ["bulk 0", "person"]

    with_room(100, work)


def test_a_person_goes_before_bulk_that_waits_and_bulk_ages() -> None:
    async def work(asker: Asker, later_s: float, then: list[str]) -> None:
        await asker.asks("first", 100, PERSON)
        await asker.asks("bulk", 30, BULK)
        await asker.asks("person", 80, PERSON, after_s=later_s)
        assert await asker.gives("first") == ["first", *then]

    with_room(100, lambda asker: work(asker, 1.0, ["person"]))
    with_room(100, lambda asker: work(asker, 3.0, ["bulk"]))


def test_what_is_larger_than_the_room_goes_alone() -> None:
    async def work(asker: Asker) -> None:
        await asker.asks("small", 10, PERSON)
        await asker.asks("huge", 300, PERSON)
        await asker.asks("next", 10, PERSON)
        assert list(asker.got) == ["small"]
        assert await asker.gives("small") == ["small", "huge"]
        assert await asker.gives("huge") == ["small", "huge", "next"]

    with_room(100, work)


def test_one_who_is_cancelled_while_waiting_lets_those_behind_pass() -> None:
    async def work(asker: Asker) -> None:
        await asker.asks("a", 60, PERSON)
        await asker.asks("large", 90, PERSON)
        await asker.asks("small", 30, PERSON)
        asker.tasks["large"].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert list(asker.got) == ["a", "small"]

    with_room(100, work)


def test_room_that_is_granted_to_one_who_is_cancelled_comes_back() -> None:
    async def work(asker: Asker) -> None:
        await asker.asks("a", 100, PERSON)
        await asker.asks("b", 50, PERSON)
        asker.got["a"].give_back()
        asker.tasks["b"].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (list(asker.got), asker.room.held) == (["a"], 0)

    with_room(100, work)

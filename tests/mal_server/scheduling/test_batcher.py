"""Batching with a clock that jumps: nothing here waits."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest

from mal_server.scheduling.batcher import Batcher, BatchSlice, DeadlineExceeded, NullObserver, QueueFull
from mal_server.scheduling.priority import Priority
from tests.mal_server.fakes import run_in_no_time

Shares = list[BatchSlice[str]]


class Runner:
    """Answers "key:item"; a batch takes `takes_s`. Items named "bad" fail alone, a key "broken" fails as a whole."""

    def __init__(self, takes_s: float = 1.0) -> None:
        self.takes_s = takes_s
        self.batches: list[list[str]] = []

    async def __call__(self, key: str, items: Sequence[str]) -> Sequence[str | Exception]:
        self.batches.append(list(items))
        await asyncio.sleep(self.takes_s)
        if key == "broken":
            raise OSError("the device is gone")
        if key == "short":
            return ["one"]
        return [ValueError(item) if item == "bad" else f"{key}:{item}" for item in items]


def batcher_of(*runners: Runner, size: int = 4, delay: float = 0.01, waiting: int = 100) -> Batcher[str, str, str]:
    return Batcher(runners, max_batch_size=size, max_delay_s=delay, max_waiting=waiting)


async def submit(batcher: Batcher[str, str, str], key: str, *items: str) -> Shares:
    with batcher.admit(len(items)) as ticket:
        return [share async for share in ticket.submit(key, items)]


def answers(shares: Shares) -> dict[int, str | Exception]:
    return {i: x for share in shares for i, x in zip(share.indices, share.outcomes, strict=True)}


def test_items_of_several_requests_share_a_batch() -> None:
    runner = Runner()

    async def work() -> list[Shares]:
        batcher = batcher_of(runner)
        return await asyncio.gather(*(submit(batcher, "k", name) for name in "abcd"))

    found = run_in_no_time(work())
    assert runner.batches == [["a", "b", "c", "d"]]
    assert [answers(shares) for shares in found] == [{0: "k:a"}, {0: "k:b"}, {0: "k:c"}, {0: "k:d"}]
    assert all(shares[0].batch_size == 4 for shares in found)


def test_a_full_batch_starts_at_once() -> None:
    found = run_in_no_time(submit(batcher_of(Runner()), "k", *"abcd"))
    assert found[0].queue_s == pytest.approx(0.0, abs=1e-6)


def test_a_lone_caller_never_waits_for_company() -> None:
    async def work() -> list[float]:
        batcher = batcher_of(Runner())
        return [(await submit(batcher, "k", "e"))[0].queue_s for _ in range(3)]

    assert run_in_no_time(work()) == pytest.approx([0.0] * 3, abs=1e-6)


def approx(seconds: float) -> Any:
    return pytest.approx(seconds, abs=5e-4)


def test_a_request_waits_for_one_in_preparation_but_no_longer_than_the_delay() -> None:
    async def work(prepares_s: float) -> tuple[float, int]:
        batcher = batcher_of(Runner())

        async def slow() -> None:
            with batcher.admit(1) as ticket:
                await asyncio.sleep(prepares_s)
                async for _ in ticket.submit("k", ["slow"]):
                    pass

        other = asyncio.create_task(slow())
        await asyncio.sleep(0)
        (share,) = await submit(batcher, "k", "quick")
        await other
        return share.queue_s, share.batch_size

    waited_s, size = run_in_no_time(work(0.004))
    assert (waited_s, size) == (approx(0.004), 2)
    waited_s, size = run_in_no_time(work(0.3))
    assert (waited_s, size) == (approx(0.01), 1)


def test_a_request_in_preparation_that_is_given_up_is_waited_for_no_more() -> None:
    async def work() -> float:
        batcher = batcher_of(Runner())
        ticket = batcher.admit(1)
        asyncio.get_running_loop().call_later(0.002, ticket.close)
        return (await submit(batcher, "k", "e"))[0].queue_s

    assert run_in_no_time(work()) == pytest.approx(0.002, abs=1e-4)


def test_callers_in_a_closed_loop_stay_in_one_batch() -> None:
    runner = Runner()

    async def work() -> None:
        batcher = batcher_of(runner)

        async def caller(thinks_s: float) -> None:
            for _ in range(5):
                await submit(batcher, "k", "x")
                await asyncio.sleep(thinks_s)

        await asyncio.gather(*(caller(0.001 * i) for i in range(3)))

    run_in_no_time(work())
    assert [len(batch) for batch in runner.batches] == [3] * 5


def test_a_caller_who_does_not_come_back_is_waited_for_once() -> None:
    async def work() -> list[float]:
        batcher = batcher_of(Runner())
        await asyncio.gather(submit(batcher, "k", "stays"), submit(batcher, "k", "leaves"))
        return [(await submit(batcher, "k", "stays"))[0].queue_s for _ in range(3)]

    assert run_in_no_time(work()) == pytest.approx([0.01, 0.0, 0.0], abs=1e-3)


def test_a_large_request_gets_one_share_for_each_batch() -> None:
    runner = Runner()
    shares = run_in_no_time(submit(batcher_of(runner), "k", *"abcdefghij"))
    assert [share.batch_size for share in shares] == [4, 4, 2]
    assert answers(shares) == {i: f"k:{name}" for i, name in enumerate("abcdefghij")}


def test_a_busy_runner_lets_batches_fill() -> None:
    runner = Runner(takes_s=1.0)

    async def work() -> None:
        batcher = batcher_of(runner, size=8)

        async def caller(number: int) -> None:
            await asyncio.sleep(0.1 * number)
            await submit(batcher, "k", str(number))

        await asyncio.gather(*(caller(i) for i in range(9)))

    run_in_no_time(work())
    assert [len(batch) for batch in runner.batches] == [1, 8]


def test_different_keys_never_share_a_batch_and_the_older_one_goes_first() -> None:
    runner = Runner()

    async def work() -> None:
        batcher = batcher_of(runner)
        await asyncio.gather(submit(batcher, "x", "a"), submit(batcher, "y", "b"), submit(batcher, "x", "c"))

    run_in_no_time(work())
    assert runner.batches == [["a", "c"], ["b"]]


def test_a_key_that_is_always_full_does_not_starve_another() -> None:
    runner = Runner()

    async def work() -> float:
        batcher = batcher_of(runner, size=2)
        busy = [asyncio.create_task(submit(batcher, "x", *"abcdefgh")) for _ in range(5)]
        await asyncio.sleep(0)
        started = asyncio.get_running_loop().time()
        late = asyncio.create_task(submit(batcher, "y", "z"))
        await asyncio.sleep(0.5)
        more = [asyncio.create_task(submit(batcher, "x", *"abcdefgh")) for _ in range(5)]
        await late
        waited = asyncio.get_running_loop().time() - started
        await asyncio.gather(*busy, *more)
        return waited

    assert run_in_no_time(work()) <= 22.0  # 20 batches were there before it


def test_two_runners_work_side_by_side() -> None:
    first, second = Runner(), Runner()

    async def work() -> float:
        await submit(batcher_of(first, second), "k", *"abcdefgh")
        return asyncio.get_running_loop().time()

    assert run_in_no_time(work()) == pytest.approx(1.0, abs=0.1)
    assert len(first.batches) == len(second.batches) == 1


def test_an_error_of_one_item_is_its_own() -> None:
    shares = run_in_no_time(submit(batcher_of(Runner()), "k", "a", "bad", "c"))
    found = answers(shares)
    assert (found[0], found[2]) == ("k:a", "k:c")
    assert isinstance(found[1], ValueError)


@pytest.mark.parametrize(("key", "kind"), [("broken", OSError), ("short", RuntimeError)])
def test_a_failing_batch_is_told_to_its_callers_and_the_next_one_runs(key: str, kind: type[Exception]) -> None:
    async def work() -> tuple[Shares, Shares]:
        batcher = batcher_of(Runner())
        return await submit(batcher, key, "a", "b"), await submit(batcher, "k", "c")

    failed, next_one = run_in_no_time(work())
    assert [type(outcome) for outcome in failed[0].outcomes] == [kind, kind]
    assert answers(next_one) == {0: "k:c"}


def test_a_cancelled_caller_does_not_stall_the_batch() -> None:
    runner = Runner()

    async def work() -> Shares:
        batcher = batcher_of(runner)
        leaving = asyncio.create_task(submit(batcher, "k", "gone"))
        staying = asyncio.create_task(submit(batcher, "k", "here"))
        await asyncio.sleep(0.5)  # both are on the device
        leaving.cancel()
        shares = await staying
        await asyncio.wait_for(submit(batcher, "k", "next"), 5)
        return shares

    assert answers(run_in_no_time(work())) == {0: "k:here"}
    assert runner.batches == [["gone", "here"], ["next"]]


def test_cancelled_callers_in_the_queue_never_reach_the_device() -> None:
    runner = Runner()

    async def work() -> int:
        batcher = batcher_of(runner, size=4)
        first = asyncio.create_task(submit(batcher, "k", *"abcd"))
        waiting = [asyncio.create_task(submit(batcher, "k", f"gone{i}")) for i in range(50)]
        last = asyncio.create_task(submit(batcher, "k", "here"))
        await asyncio.sleep(0.5)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        left = batcher.waiting
        await asyncio.gather(first, last)
        return left

    assert run_in_no_time(work()) == 1
    assert runner.batches == [["a", "b", "c", "d"], ["here"]]


def test_a_full_queue_refuses_with_the_time_it_needs() -> None:
    async def work() -> float:
        batcher = batcher_of(Runner(takes_s=2.0), size=4, waiting=8)
        await submit(batcher, "k", *"abcd")  # 2 items a second from now on
        running = asyncio.create_task(submit(batcher, "k", *"abcd"))
        queued = asyncio.create_task(submit(batcher, "k", *"efghijkl"))
        await asyncio.sleep(0.5)
        with pytest.raises(QueueFull) as refused:
            batcher.admit(6)
        await asyncio.gather(running, queued)
        batcher.admit(8)
        return refused.value.retry_after_s

    assert run_in_no_time(work()) == pytest.approx(3.0)  # 6 too many at 2 a second


def test_a_ticket_that_is_never_used_gives_its_room_back() -> None:
    async def work() -> int:
        batcher = batcher_of(Runner(), waiting=8)
        with batcher.admit(8):
            assert batcher.waiting == 8
        return batcher.waiting

    assert run_in_no_time(work()) == 0


def test_a_ticket_gives_room_back_that_its_items_do_not_need() -> None:
    async def work() -> int:
        batcher = batcher_of(Runner(), waiting=8)
        with batcher.admit(8) as ticket:
            shares = ticket.submit("k", ["a"])
            await anext(shares)
            return batcher.waiting

    assert run_in_no_time(work()) == 0


def test_a_ticket_refuses_more_than_it_was_admitted_for() -> None:
    async def work() -> None:
        with batcher_of(Runner()).admit(1) as ticket:
            await anext(ticket.submit("k", ["a", "b"]))

    with pytest.raises(ValueError, match="a ticket for 1"):
        run_in_no_time(work())


def test_nothing_is_left_behind_by_many_cancelled_callers() -> None:
    runner = Runner(takes_s=0.01)

    async def work() -> tuple[int, Shares]:
        batcher = batcher_of(runner, waiting=1000)
        for _ in range(20):
            tasks = [asyncio.create_task(submit(batcher, "k", *"abc")) for _ in range(50)]
            await asyncio.sleep(0.015)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.idle()
        return batcher.waiting, await submit(batcher, "k", "still")

    waiting, shares = run_in_no_time(work())
    assert waiting == 0
    assert answers(shares) == {0: "k:still"}


class Counting(NullObserver):
    """Keeps what was dropped."""

    def __init__(self) -> None:
        self.drops: dict[str, int] = {}

    def dropped(self, reason: str, crops: int) -> None:
        self.drops[reason] = self.drops.get(reason, 0) + crops


def sorted_batcher(
    runner: Runner, *, size: int = 2, patience: float = 10.0, observer: Counting | None = None
) -> Batcher[str, str, str]:
    return Batcher(
        [runner],
        max_batch_size=size,
        max_delay_s=0.01,
        max_waiting=1000,
        max_bytes=1000,
        patience_s=patience,
        observer=observer,
    )


async def submit_as(
    batcher: Batcher[str, str, str],
    priority: Priority,
    *items: str,
    key: str = "k",
    after_s: float = 0.0,
    within_s: float = math.inf,
    size_bytes: float = 0.0,
) -> Shares:
    await asyncio.sleep(after_s)
    deadline = asyncio.get_running_loop().time() + within_s
    with batcher.admit(len(items), priority=priority, deadline=deadline, size_bytes=size_bytes) as ticket:
        return [share async for share in ticket.submit(key, items)]


@pytest.mark.parametrize("keys", [("k", "k"), ("bulk", "screen")])
def test_an_interactive_request_waits_for_one_batch_of_a_saturating_bulk_job(keys: tuple[str, str]) -> None:
    runner = Runner(takes_s=1.0)

    async def work() -> Shares:
        batcher = sorted_batcher(runner, patience=math.inf)
        bulk = asyncio.create_task(submit_as(batcher, Priority.BATCH, *["b"] * 40, key=keys[0]))
        shares = await submit_as(batcher, Priority.INTERACTIVE, "i", key=keys[1], after_s=3.5)
        await bulk
        return shares

    (share,) = run_in_no_time(work())
    assert share.queue_s == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("keys", [("k", "k"), ("bulk", "screen")])
@pytest.mark.parametrize("before_end_s", [0.999, 0.5, 0.001])
def test_an_interactive_request_is_in_the_next_batch_however_long_bulk_work_has_waited(
    keys: tuple[str, str], before_end_s: float
) -> None:
    runner = Runner(takes_s=1.0)

    async def work() -> Shares:
        batcher = sorted_batcher(runner, patience=2.0)  # 100 s of bulk work: nearly all of it waits longer
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.BATCH, *["b"] * 400, key=keys[0]))
            people = [
                group.create_task(submit_as(batcher, Priority.INTERACTIVE, "i", key=keys[1], after_s=at - before_end_s))
                for at in range(10, 60, 7)
            ]
        return [share for task in people for share in task.result()]

    found = run_in_no_time(work())
    assert [share.queue_s for share in found] == [approx(before_end_s)] * 8


@pytest.mark.parametrize("keys", [("k", "k"), ("bulk", "screen")])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_people_who_keep_the_device_busy_leave_a_quarter_of_it_to_bulk_work_that_waited(
    size: int, keys: tuple[str, str]
) -> None:
    runner = Runner(takes_s=1.0)

    async def person(batcher: Batcher[str, str, str]) -> None:
        for _ in range(60):
            await submit_as(batcher, Priority.INTERACTIVE, *["i"] * size, key=keys[1])

    async def work() -> None:
        batcher = sorted_batcher(runner, size=size, patience=2.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.BATCH, *["b"] * 20 * size, key=keys[0]))
            for _ in range(3):
                group.create_task(person(batcher))

    run_in_no_time(work())
    begun = runner.batches[4:64]
    assert sum(batch.count("b") for batch in begun) == pytest.approx(15 * size, abs=size)


@pytest.mark.parametrize("patience", [0.0, 2.0, math.inf])
def test_bulk_jobs_that_cannot_share_a_batch_take_turns(patience: float) -> None:
    runner = Runner(takes_s=1.0)

    async def job(batcher: Batcher[str, str, str], name: str) -> None:
        for _ in range(20):
            await submit_as(batcher, Priority.BATCH, name, name, key=name)

    async def work() -> None:
        batcher = sorted_batcher(runner, patience=patience)
        async with asyncio.TaskGroup() as group:
            for name in "aabbb":  # two callers keep the first always full
                group.create_task(job(batcher, name))

    run_in_no_time(work())
    begun = [batch[0] for batch in runner.batches[:40]]
    assert begun.count("a") == pytest.approx(16, abs=2)  # of five callers two


@pytest.mark.parametrize("people_key", ["a", "b", "c"])
def test_bulk_work_beside_people_and_other_bulk_work_gets_its_part(people_key: str) -> None:
    runner = Runner(takes_s=1.0)

    async def caller(batcher: Batcher[str, str, str], priority: Priority, name: str, key: str) -> None:
        for _ in range(100):
            await submit_as(batcher, priority, *[name] * 4, key=key)

    async def work() -> None:
        batcher = sorted_batcher(runner, size=4, patience=2.0)
        async with asyncio.TaskGroup() as group:
            for name in "ab" * 3:
                group.create_task(caller(batcher, Priority.BATCH, name, name))
            for _ in range(3):
                group.create_task(caller(batcher, Priority.INTERACTIVE, "i", people_key))

    run_in_no_time(work())
    ran = [item for batch in runner.batches[20:180] for item in batch]
    assert len(ran) == 640
    assert ran.count("a") + ran.count("b") == pytest.approx(160, abs=16)  # a quarter together
    assert ran.count("a") == pytest.approx(80, abs=16)


def test_without_patience_it_is_first_come_first_served() -> None:
    runner = Runner(takes_s=1.0)

    async def work() -> None:
        batcher = sorted_batcher(runner, size=4, patience=0.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.BATCH, *["b"] * 12))
            group.create_task(submit_as(batcher, Priority.INTERACTIVE, "i", after_s=0.5))

    run_in_no_time(work())
    assert [batch.count("i") for batch in runner.batches] == [0, 0, 0, 1]


def test_a_bulk_job_that_waited_its_patience_is_passed_by_three_more_and_no_further() -> None:
    runner = Runner(takes_s=1.0)

    async def work() -> None:
        batcher = sorted_batcher(runner, size=1, patience=3.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.INTERACTIVE, "first"))
            group.create_task(submit_as(batcher, Priority.BATCH, "bulk", after_s=0.5))
            for i in range(10):  # one a second: without aging, bulk would come last
                group.create_task(submit_as(batcher, Priority.INTERACTIVE, f"i{i}", after_s=0.6 + i * 0.9))

    run_in_no_time(work())
    # Its patience ends at 3.5 s, and i3 came before that; i4, i5 and i6 pass it.
    assert [batch[0] for batch in runner.batches].index("bulk") == 8


def test_batches_are_filled_up_with_bulk_work() -> None:
    runner = Runner()

    async def work() -> None:
        batcher = sorted_batcher(runner, size=4)
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.BATCH, "b", "b"))
            group.create_task(submit_as(batcher, Priority.INTERACTIVE, "i"))

    run_in_no_time(work())
    assert runner.batches == [["i", "b", "b"]]


def test_what_is_past_its_deadline_is_never_run() -> None:
    runner, observer = Runner(takes_s=1.0), Counting()

    async def work() -> Shares:
        batcher = sorted_batcher(runner, observer=observer)
        first = asyncio.create_task(submit_as(batcher, Priority.INTERACTIVE, "a", "a"))
        late = await submit_as(batcher, Priority.INTERACTIVE, "x", "y", "z", after_s=0.1, within_s=0.5)
        await first
        assert batcher.waiting == 0
        return late

    (late,) = run_in_no_time(work())
    assert runner.batches == [["a", "a"]]
    assert late.indices == (0, 1, 2)
    assert all(isinstance(outcome, DeadlineExceeded) for outcome in late.outcomes)
    assert observer.drops == {"deadline_queue": 3}


def test_what_comes_after_its_deadline_is_refused_at_the_entry() -> None:
    observer = Counting()

    async def work() -> None:
        await submit_as(sorted_batcher(Runner(), observer=observer), Priority.INTERACTIVE, "a", within_s=0.0)

    with pytest.raises(DeadlineExceeded):
        run_in_no_time(work())
    assert observer.drops == {"deadline_entry": 1}


def test_what_could_not_be_ready_in_time_is_refused_at_once() -> None:
    async def work() -> QueueFull:
        batcher = sorted_batcher(Runner(takes_s=1.0))
        await submit_as(batcher, Priority.INTERACTIVE, "a", "a")  # measured: a batch takes 1 s
        bulk = asyncio.create_task(submit_as(batcher, Priority.INTERACTIVE, *["b"] * 20))
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull, match=r"the deadline is in 3\.0 s") as raised:
            await submit_as(batcher, Priority.INTERACTIVE, "late", within_s=3.0)
        await submit_as(batcher, Priority.INTERACTIVE, "patient", within_s=30.0)
        await bulk
        return raised.value

    assert 1.0 < run_in_no_time(work()).retry_after_s < 10.0


def test_what_waits_is_bounded_in_bytes() -> None:
    async def work() -> None:
        batcher = sorted_batcher(Runner(), size=1)
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.BATCH, "a", size_bytes=5000))  # alone it may be larger
            group.create_task(submit_as(batcher, Priority.BATCH, *"bcd", size_bytes=900, after_s=0.5))
            await asyncio.sleep(0.6)
            assert batcher.waiting_bytes == pytest.approx(900)
            with pytest.raises(QueueFull, match="pass the limit of 0 MB"):
                batcher.admit(1, size_bytes=200)
            await asyncio.sleep(1.0)  # "b" runs
            assert batcher.waiting_bytes == pytest.approx(600)
            batcher.admit(1, size_bytes=200).close()
        assert batcher.waiting_bytes == 0

    run_in_no_time(work())


def test_when_it_breaks_off_everything_that_waits_is_answered_and_nothing_is_admitted() -> None:
    gone = OSError("gone")

    async def work() -> list[Shares]:
        batcher = sorted_batcher(Runner(takes_s=1.0))
        calls = [asyncio.create_task(submit_as(batcher, Priority.INTERACTIVE, "a", "b", "c")) for _ in range(3)]
        await asyncio.sleep(0.5)
        early = batcher.admit(1)
        batcher.break_off(gone)
        with pytest.raises(OSError, match="gone"):
            batcher.admit(1)
        with early, pytest.raises(OSError, match="gone"):
            batcher.enqueue(early, "k", ["x"])
        found = await asyncio.gather(*calls)
        assert batcher.waiting == 0
        return found

    first, *others = run_in_no_time(work())
    assert answers(first) == {0: "k:a", 1: "k:b", 2: gone}
    assert [answers(shares) for shares in others] == [dict.fromkeys(range(3), gone)] * 2


def test_a_cancelled_caller_is_counted_where_its_work_was() -> None:
    observer = Counting()

    async def work() -> None:
        batcher = sorted_batcher(Runner(takes_s=1.0), observer=observer)
        call = asyncio.create_task(submit_as(batcher, Priority.INTERACTIVE, *"abcde"))
        await asyncio.sleep(0.5)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await batcher.idle()

    run_in_no_time(work())
    assert observer.drops == {"cancelled_queue": 3, "cancelled_device": 2}

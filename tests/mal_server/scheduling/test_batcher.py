"""The batcher on a fake clock: no test sleeps."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest

from mal_server.scheduling.admission import DeadlineExceeded, QueueFull
from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.priority import Priority
from tests.mal_server.fakes import run_on_fake_clock
from tests.mal_server.scheduling.batchers import (
    Counting,
    Runner,
    Slices,
    batcher_of,
    batcher_with_aging,
    outcomes,
    submit,
    submit_as,
)


def test_items_of_several_requests_share_a_batch() -> None:
    runner = Runner()

    async def work() -> list[Slices]:
        batcher = batcher_of(runner)
        return await asyncio.gather(*(submit(batcher, "k", name) for name in "abcd"))

    results = run_on_fake_clock(work())
    assert runner.batches == [["a", "b", "c", "d"]]
    assert [outcomes(slices) for slices in results] == [{0: "k:a"}, {0: "k:b"}, {0: "k:c"}, {0: "k:d"}]
    assert all(slices[0].batch_size == 4 for slices in results)


def test_a_full_batch_starts_immediately() -> None:
    results = run_on_fake_clock(submit(batcher_of(Runner()), "k", *"abcd"))
    assert results[0].queue_s == pytest.approx(0.0, abs=1e-6)


def test_the_next_full_batch_starts_before_the_last_one_is_delivered() -> None:
    """The order of events with two requests of a full batch each: the second batch does not wait for the first."""
    events: list[str] = []

    async def runner(key: str, items: Sequence[str]) -> Sequence[str]:
        events.append("runs " + "".join(items))
        await asyncio.sleep(1.0)
        return items

    async def request(batcher: Batcher[str, str, str], *items: str) -> None:
        with batcher.admit(len(items)) as admission:
            async for batch_slice in admission.submit("k", items):
                events.append("takes " + "".join(str(outcome) for outcome in batch_slice.outcomes))

    async def work() -> None:
        batcher = Batcher([runner], max_batch_size=2, max_delay_s=0.01, max_waiting=100)
        await asyncio.gather(request(batcher, "a", "b"), request(batcher, "c", "d"), request(batcher, "e"))

    run_on_fake_clock(work())
    assert events == ["runs ab", "runs cd", "takes ab", "takes cd", "runs e", "takes e"]


def test_a_single_client_is_never_delayed() -> None:
    async def work() -> list[float]:
        batcher = batcher_of(Runner())
        return [(await submit(batcher, "k", "e"))[0].queue_s for _ in range(3)]

    assert run_on_fake_clock(work()) == pytest.approx([0.0] * 3, abs=1e-6)


def approx(seconds: float) -> Any:
    return pytest.approx(seconds, abs=5e-4)


def test_a_request_waits_for_one_in_preparation_at_most_max_delay_s() -> None:
    async def work(prepares_s: float) -> tuple[float, int]:
        batcher = batcher_of(Runner())

        async def slow() -> None:
            with batcher.admit(1) as admission:
                await asyncio.sleep(prepares_s)
                async for _ in admission.submit("k", ["slow"]):
                    pass

        other = asyncio.create_task(slow())
        await asyncio.sleep(0)
        (batch_slice,) = await submit(batcher, "k", "quick")
        await other
        return batch_slice.queue_s, batch_slice.batch_size

    waited_s, size = run_on_fake_clock(work(0.004))
    assert (waited_s, size) == (approx(0.004), 2)
    waited_s, size = run_on_fake_clock(work(0.3))
    assert (waited_s, size) == (approx(0.01), 1)


def test_a_request_stops_waiting_for_one_that_is_closed_in_preparation() -> None:
    async def work() -> float:
        batcher = batcher_of(Runner())
        admission = batcher.admit(1)
        asyncio.get_running_loop().call_later(0.002, admission.close)
        return (await submit(batcher, "k", "e"))[0].queue_s

    assert run_on_fake_clock(work()) == pytest.approx(0.002, abs=1e-4)


def test_clients_in_a_closed_loop_stay_in_one_batch() -> None:
    runner = Runner()

    async def work() -> None:
        batcher = batcher_of(runner)

        async def caller(thinks_s: float) -> None:
            for _ in range(5):
                await submit(batcher, "k", "x")
                await asyncio.sleep(thinks_s)

        await asyncio.gather(*(caller(0.001 * i) for i in range(3)))

    run_on_fake_clock(work())
    assert [len(batch) for batch in runner.batches] == [3] * 5


def test_a_client_that_does_not_return_delays_others_only_once() -> None:
    async def work() -> list[float]:
        batcher = batcher_of(Runner())
        await asyncio.gather(submit(batcher, "k", "stays"), submit(batcher, "k", "leaves"))
        return [(await submit(batcher, "k", "stays"))[0].queue_s for _ in range(3)]

    assert run_on_fake_clock(work()) == pytest.approx([0.01, 0.0, 0.0], abs=1e-3)


def test_a_large_request_gets_one_slice_for_each_batch() -> None:
    runner = Runner()
    slices = run_on_fake_clock(submit(batcher_of(runner), "k", *"abcdefghij"))
    assert [batch_slice.batch_size for batch_slice in slices] == [4, 4, 2]
    assert outcomes(slices) == {i: f"k:{name}" for i, name in enumerate("abcdefghij")}


def test_a_busy_runner_lets_batches_fill() -> None:
    runner = Runner(takes_s=1.0)

    async def work() -> None:
        batcher = batcher_of(runner, size=8)

        async def caller(number: int) -> None:
            await asyncio.sleep(0.1 * number)
            await submit(batcher, "k", str(number))

        await asyncio.gather(*(caller(i) for i in range(9)))

    run_on_fake_clock(work())
    assert [len(batch) for batch in runner.batches] == [1, 8]


def test_different_keys_never_share_a_batch_and_the_older_one_goes_first() -> None:
    runner = Runner()

    async def work() -> None:
        batcher = batcher_of(runner)
        await asyncio.gather(submit(batcher, "x", "a"), submit(batcher, "y", "b"), submit(batcher, "x", "c"))

    run_on_fake_clock(work())
    assert runner.batches == [["a", "c"], ["b"]]


def test_a_key_with_full_batches_does_not_starve_another() -> None:
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

    assert run_on_fake_clock(work()) <= 22.0  # 20 batches were queued before it


def test_two_runners_run_batches_in_parallel() -> None:
    first, second = Runner(), Runner()

    async def work() -> float:
        await submit(batcher_of(first, second), "k", *"abcdefgh")
        return asyncio.get_running_loop().time()

    assert run_on_fake_clock(work()) == pytest.approx(1.0, abs=0.1)
    assert len(first.batches) == len(second.batches) == 1


def test_an_error_of_one_item_does_not_affect_the_others() -> None:
    slices = run_on_fake_clock(submit(batcher_of(Runner()), "k", "a", "bad", "c"))
    by_index = outcomes(slices)
    assert (by_index[0], by_index[2]) == ("k:a", "k:c")
    assert isinstance(by_index[1], ValueError)


@pytest.mark.parametrize(("key", "error_type"), [("broken", OSError), ("short", RuntimeError)])
def test_a_failing_batch_fails_its_own_requests_and_the_next_one_runs(key: str, error_type: type[Exception]) -> None:
    async def work() -> tuple[Slices, Slices]:
        batcher = batcher_of(Runner())
        return await submit(batcher, key, "a", "b"), await submit(batcher, "k", "c")

    failed, next_one = run_on_fake_clock(work())
    assert [type(outcome) for outcome in failed[0].outcomes] == [error_type, error_type]
    assert outcomes(next_one) == {0: "k:c"}


def test_a_cancelled_caller_does_not_stall_the_batch() -> None:
    runner = Runner()

    async def work() -> Slices:
        batcher = batcher_of(runner)
        cancelled = asyncio.create_task(submit(batcher, "k", "cancelled"))
        staying = asyncio.create_task(submit(batcher, "k", "here"))
        await asyncio.sleep(0.5)  # both are on the device
        cancelled.cancel()
        slices = await staying
        await asyncio.wait_for(submit(batcher, "k", "next"), 5)
        return slices

    assert outcomes(run_on_fake_clock(work())) == {0: "k:here"}
    assert runner.batches == [["cancelled", "here"], ["next"]]


def test_items_of_cancelled_callers_never_run() -> None:
    runner = Runner()

    async def work() -> int:
        batcher = batcher_of(runner, size=4)
        first = asyncio.create_task(submit(batcher, "k", *"abcd"))
        waiting = [asyncio.create_task(submit(batcher, "k", f"cancelled {i}")) for i in range(50)]
        last = asyncio.create_task(submit(batcher, "k", "here"))
        await asyncio.sleep(0.5)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        left = batcher.waiting
        await asyncio.gather(first, last)
        return left

    assert run_on_fake_clock(work()) == 1
    assert runner.batches == [["a", "b", "c", "d"], ["here"]]


def test_a_full_queue_refuses_with_an_estimated_retry_delay() -> None:
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

    assert run_on_fake_clock(work()) == pytest.approx(3.0)  # 6 excess items at 2 items per second


def test_closing_an_unused_admission_releases_its_capacity() -> None:
    async def work() -> int:
        batcher = batcher_of(Runner(), waiting=8)
        with batcher.admit(8):
            assert batcher.waiting == 8
        return batcher.waiting

    assert run_on_fake_clock(work()) == 0


def test_submitting_fewer_items_than_admitted_releases_the_rest() -> None:
    async def work() -> int:
        batcher = batcher_of(Runner(), waiting=8)
        with batcher.admit(8) as admission:
            slices = admission.submit("k", ["a"])
            await anext(slices)
            return batcher.waiting

    assert run_on_fake_clock(work()) == 0


def test_submitting_more_items_than_admitted_is_an_error() -> None:
    async def work() -> None:
        with batcher_of(Runner()).admit(1) as admission:
            await anext(admission.submit("k", ["a", "b"]))

    with pytest.raises(ValueError, match="2 items"):
        run_on_fake_clock(work())


def test_many_cancelled_callers_leave_nothing_in_the_queue() -> None:
    runner = Runner(takes_s=0.01)

    async def work() -> tuple[int, Slices]:
        batcher = batcher_of(runner, waiting=1000)
        for _ in range(20):
            tasks = [asyncio.create_task(submit(batcher, "k", *"abc")) for _ in range(50)]
            await asyncio.sleep(0.015)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.wait_until_idle()
        return batcher.waiting, await submit(batcher, "k", "still")

    waiting, slices = run_on_fake_clock(work())
    assert waiting == 0
    assert outcomes(slices) == {0: "k:still"}


@pytest.mark.parametrize("keys", [("k", "k"), ("bulk", "single")])
def test_an_interactive_request_waits_for_one_batch_of_a_saturating_bulk_job(keys: tuple[str, str]) -> None:
    runner = Runner(takes_s=1.0)

    async def work() -> Slices:
        batcher = batcher_with_aging(runner, aging_s=math.inf)
        bulk = asyncio.create_task(submit_as(batcher, Priority.BATCH, *["b"] * 40, key=keys[0]))
        slices = await submit_as(batcher, Priority.INTERACTIVE, "i", key=keys[1], after_s=3.5)
        await bulk
        return slices

    (batch_slice,) = run_on_fake_clock(work())
    assert batch_slice.queue_s == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("keys", [("k", "k"), ("bulk", "single")])
@pytest.mark.parametrize("before_end_s", [0.999, 0.5, 0.001])
def test_an_interactive_request_is_in_the_next_batch_however_long_bulk_work_has_waited(
    keys: tuple[str, str], before_end_s: float
) -> None:
    runner = Runner(takes_s=1.0)

    async def work() -> Slices:
        batcher = batcher_with_aging(runner, aging_s=2.0)  # 100 s of bulk work: nearly all of it ages
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.BATCH, *["b"] * 400, key=keys[0]))
            calls = [
                group.create_task(submit_as(batcher, Priority.INTERACTIVE, "i", key=keys[1], after_s=at - before_end_s))
                for at in range(10, 60, 7)
            ]
        return [batch_slice for task in calls for batch_slice in task.result()]

    results = run_on_fake_clock(work())
    assert [batch_slice.queue_s for batch_slice in results] == [approx(before_end_s)] * 8


@pytest.mark.parametrize("keys", [("k", "k"), ("bulk", "single")])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_aged_bulk_work_gets_a_quarter_of_a_device_that_interactive_work_saturates(
    size: int, keys: tuple[str, str]
) -> None:
    runner = Runner(takes_s=1.0)

    async def interactive(batcher: Batcher[str, str, str]) -> None:
        for _ in range(60):
            await submit_as(batcher, Priority.INTERACTIVE, *["i"] * size, key=keys[1])

    async def work() -> None:
        batcher = batcher_with_aging(runner, size=size, aging_s=2.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.BATCH, *["b"] * 20 * size, key=keys[0]))
            for _ in range(3):
                group.create_task(interactive(batcher))

    run_on_fake_clock(work())
    begun = runner.batches[4:64]
    assert sum(batch.count("b") for batch in begun) == pytest.approx(15 * size, abs=size)


@pytest.mark.parametrize("aging_s", [0.0, 2.0, math.inf])
def test_bulk_jobs_of_different_keys_take_turns(aging_s: float) -> None:
    runner = Runner(takes_s=1.0)

    async def job(batcher: Batcher[str, str, str], name: str) -> None:
        for _ in range(20):
            await submit_as(batcher, Priority.BATCH, name, name, key=name)

    async def work() -> None:
        batcher = batcher_with_aging(runner, aging_s=aging_s)
        async with asyncio.TaskGroup() as group:
            for name in "aabbb":  # two clients keep the first queue full
                group.create_task(job(batcher, name))

    run_on_fake_clock(work())
    begun = [batch[0] for batch in runner.batches[:40]]
    assert begun.count("a") == pytest.approx(16, abs=2)  # two of five clients


@pytest.mark.parametrize("interactive_key", ["a", "b", "c"])
def test_two_bulk_keys_share_the_quarter_beside_interactive_work(interactive_key: str) -> None:
    runner = Runner(takes_s=1.0)

    async def caller(batcher: Batcher[str, str, str], priority: Priority, name: str, key: str) -> None:
        for _ in range(100):
            await submit_as(batcher, priority, *[name] * 4, key=key)

    async def work() -> None:
        batcher = batcher_with_aging(runner, size=4, aging_s=2.0)
        async with asyncio.TaskGroup() as group:
            for name in "ab" * 3:
                group.create_task(caller(batcher, Priority.BATCH, name, name))
            for _ in range(3):
                group.create_task(caller(batcher, Priority.INTERACTIVE, "i", interactive_key))

    run_on_fake_clock(work())
    ran = [item for batch in runner.batches[20:180] for item in batch]
    assert len(ran) == 640
    assert ran.count("a") + ran.count("b") == pytest.approx(160, abs=16)  # a quarter together
    assert ran.count("a") == pytest.approx(80, abs=16)


def test_without_aging_the_order_is_first_come_first_served() -> None:
    runner = Runner(takes_s=1.0)

    async def work() -> None:
        batcher = batcher_with_aging(runner, size=4, aging_s=0.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.BATCH, *["b"] * 12))
            group.create_task(submit_as(batcher, Priority.INTERACTIVE, "i", after_s=0.5))

    run_on_fake_clock(work())
    assert [batch.count("i") for batch in runner.batches] == [0, 0, 0, 1]


def test_an_aged_bulk_item_is_passed_by_three_interactive_items_and_no_more() -> None:
    runner = Runner(takes_s=1.0)

    async def work() -> None:
        batcher = batcher_with_aging(runner, size=1, aging_s=3.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.INTERACTIVE, "first"))
            group.create_task(submit_as(batcher, Priority.BATCH, "bulk", after_s=0.5))
            for i in range(10):  # about one a second: without aging, bulk would run last
                group.create_task(submit_as(batcher, Priority.INTERACTIVE, f"i{i}", after_s=0.6 + i * 0.9))

    run_on_fake_clock(work())
    # It ages at 3.5 s, and i3 arrived before that; i4, i5 and i6 pass it.
    assert [batch[0] for batch in runner.batches].index("bulk") == 8


def test_bulk_items_fill_up_interactive_batches() -> None:
    runner = Runner()

    async def work() -> None:
        batcher = batcher_with_aging(runner, size=4)
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.BATCH, "b", "b"))
            group.create_task(submit_as(batcher, Priority.INTERACTIVE, "i"))

    run_on_fake_clock(work())
    assert runner.batches == [["i", "b", "b"]]


def test_items_past_their_deadline_never_run() -> None:
    runner, observer = Runner(takes_s=1.0), Counting()

    async def work() -> Slices:
        batcher = batcher_with_aging(runner, observer=observer)
        first = asyncio.create_task(submit_as(batcher, Priority.INTERACTIVE, "a", "a"))
        late = await submit_as(batcher, Priority.INTERACTIVE, "x", "y", "z", after_s=0.1, within_s=0.5)
        await first
        assert batcher.waiting == 0
        return late

    (late,) = run_on_fake_clock(work())
    assert runner.batches == [["a", "a"]]
    assert late.indices == (0, 1, 2)
    assert all(isinstance(outcome, DeadlineExceeded) for outcome in late.outcomes)
    assert observer.drops == {"deadline_queue": 3}


def test_a_request_past_its_deadline_is_refused_on_admission() -> None:
    observer = Counting()

    async def work() -> None:
        await submit_as(batcher_with_aging(Runner(), observer=observer), Priority.INTERACTIVE, "a", within_s=0.0)

    with pytest.raises(DeadlineExceeded):
        run_on_fake_clock(work())
    assert observer.drops == {"deadline_entry": 1}


def test_a_request_that_cannot_finish_before_its_deadline_is_refused_on_admission() -> None:
    async def work() -> QueueFull:
        batcher = batcher_with_aging(Runner(takes_s=1.0))
        await submit_as(batcher, Priority.INTERACTIVE, "a", "a")  # measured: a batch takes 1 s
        bulk = asyncio.create_task(submit_as(batcher, Priority.INTERACTIVE, *["b"] * 20))
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull, match=r"deadline.* 3\.0 s") as raised:
            await submit_as(batcher, Priority.INTERACTIVE, "late", within_s=3.0)
        await submit_as(batcher, Priority.INTERACTIVE, "in time", within_s=30.0)
        await bulk
        return raised.value

    assert 1.0 < run_on_fake_clock(work()).retry_after_s < 10.0


def test_fail_all_fails_every_queued_item_and_every_later_request() -> None:
    lost = OSError("lost")

    async def work() -> list[Slices]:
        batcher = batcher_with_aging(Runner(takes_s=1.0))
        calls = [asyncio.create_task(submit_as(batcher, Priority.INTERACTIVE, "a", "b", "c")) for _ in range(3)]
        await asyncio.sleep(0.5)
        early = batcher.admit(1)
        batcher.fail_all(lost)
        with pytest.raises(OSError, match="lost"):
            batcher.admit(1)
        with early, pytest.raises(OSError, match="lost"):
            batcher.enqueue(early, "k", ["x"])
        results = await asyncio.gather(*calls)
        assert batcher.waiting == 0
        return results

    first, *others = run_on_fake_clock(work())
    assert outcomes(first) == {0: "k:a", 1: "k:b", 2: lost}
    assert [outcomes(slices) for slices in others] == [dict.fromkeys(range(3), lost)] * 2


def test_items_of_a_cancelled_caller_are_counted_by_the_stage_that_they_reached() -> None:
    observer = Counting()

    async def work() -> None:
        batcher = batcher_with_aging(Runner(takes_s=1.0), observer=observer)
        call = asyncio.create_task(submit_as(batcher, Priority.INTERACTIVE, *"abcde"))
        await asyncio.sleep(0.5)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await batcher.wait_until_idle()

    run_on_fake_clock(work())
    assert observer.drops == {"cancelled_queue": 3, "cancelled_device": 2}

"""Memory and places of a batcher: counted, given back, and shared by priorities and callers."""

import asyncio
import gc
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from mal_server.scheduling.admission import QueueFull
from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.priority import Priority
from tests.mal_server.fakes import run_on_fake_clock
from tests.mal_server.scheduling.batchers import (
    Runner,
    batcher_with_aging,
    submit_as,
)


def test_the_memory_of_a_request_is_counted_until_its_results_are_taken() -> None:
    async def work() -> None:
        batcher = batcher_with_aging(Runner(), size=1)
        with batcher.admit(3, size_bytes=900) as admission:
            slices = admission.submit("k", "bcd")
            await anext(slices)  # "b" has run, and its result is being used
            with pytest.raises(QueueFull):
                batcher.admit(1, size_bytes=200)
            admission.free_taken()
            assert batcher.held_bytes == 600
            await asyncio.sleep(5.0)  # "d" has run, and nobody has taken its result
            assert (batcher.waiting, batcher.held_bytes) == (0, 600)
            batcher.admit(1, size_bytes=200).close()
        assert batcher.held_bytes == 0

    run_on_fake_clock(work())


def test_the_memory_that_all_items_share_is_counted_until_the_request_ends() -> None:
    async def work() -> None:
        batcher = batcher_with_aging(Runner(), size=1)
        with batcher.admit(100, size_bytes=100, shared_bytes=700) as admission:
            await anext(admission.submit("k", "bc"))
            assert batcher.held_bytes == 702
            admission.free_taken()
            assert batcher.held_bytes == 701
            with pytest.raises(QueueFull):
                batcher.admit(1, shared_bytes=400)
        assert batcher.held_bytes == 0

    run_on_fake_clock(work())


def test_a_result_larger_than_its_item_is_counted_or_refused() -> None:
    async def work() -> None:
        batcher = batcher_with_aging(Runner(), size=1)
        with batcher.admit(2, size_bytes=200) as admission, batcher.admit(1, size_bytes=300) as other:
            await anext(admission.submit("k", "bc"))
            admission.hold(50)
            assert batcher.held_bytes == 500
            admission.hold(400)
            admission.hold(300)
            assert batcher.held_bytes == 800
            with pytest.raises(QueueFull):
                admission.hold(700)
            other.close()
            admission.hold(5000)  # nobody else holds any
            admission.free_taken()
            assert batcher.held_bytes == 100
        assert batcher.held_bytes == 0

    run_on_fake_clock(work())


def test_a_request_of_any_size_is_admitted_where_nothing_is_held() -> None:
    async def work() -> None:
        batcher = batcher_with_aging(Runner(), size=1)
        with batcher.admit(1, size_bytes=5000):
            assert batcher.held_bytes == 5000
        assert batcher.held_bytes == 0

    run_on_fake_clock(work())


def test_the_memory_of_items_is_given_back_however_the_request_ends() -> None:
    kept: list[weakref.ref[Any]] = []

    class Payload:
        pass

    async def runner(key: str, items: Sequence[Payload]) -> Sequence[str]:
        await asyncio.sleep(1.0)
        if key == "broken":
            raise OSError("the batch failed")
        return ["done"] * len(items)

    async def call(batcher: Batcher[str, Payload, str], count: int, key: str, deadline: float) -> None:
        payloads = [Payload() for _ in range(count)]
        kept.extend(weakref.ref(payload) for payload in payloads)
        with batcher.admit(count, size_bytes=10 * count, deadline=deadline) as admission:
            slices = admission.submit(key, payloads)
            del payloads
            async for _ in slices:
                pass

    async def work() -> tuple[int, int, int]:
        batcher = Batcher([runner], max_batch_size=1, max_delay_s=0.0, max_waiting=1000)
        loop = asyncio.get_running_loop()
        live = loop.create_task(call(batcher, 20, "k", math.inf))
        await asyncio.sleep(0.5)
        behind = [loop.create_task(call(batcher, 10, "k", math.inf)) for _ in range(5)]
        failing = loop.create_task(call(batcher, 1, "broken", math.inf))
        late = loop.create_task(call(batcher, 1, "k", 2.0))
        await asyncio.sleep(0.1)
        before = batcher.held_bytes
        for task in behind:
            task.cancel()
        await asyncio.gather(live, late, failing, *behind, return_exceptions=True)
        return before, batcher.held_bytes, sum(reference() is not None for reference in kept)

    gc.disable()  # a cycle would keep the memory for as long as nothing else is allocated
    try:
        assert run_on_fake_clock(work()) == (10 * (20 + 50 + 2), 0, 0)
    finally:
        gc.enable()


def test_interactive_requests_are_never_refused_because_of_bulk_work() -> None:
    async def work() -> tuple[int, int]:
        batcher = Batcher(
            [Runner(takes_s=1.0)],
            max_batch_size=4,
            max_delay_s=0.01,
            max_waiting=100,
            max_bytes=1000,
            batch_share=0.5,
            batch_aging_s=2.0,
        )

        async def bulk() -> None:
            while True:
                try:
                    await submit_as(batcher, Priority.BATCH, *"bbbbb", size_bytes=50)
                except QueueFull as error:
                    await asyncio.sleep(error.retry_after_s)

        tasks = [asyncio.create_task(bulk()) for _ in range(200)]
        await asyncio.sleep(20.0)
        served, peak = 0, 0
        for _ in range(50):
            served += len(await submit_as(batcher, Priority.INTERACTIVE, "i", size_bytes=450))
            peak = max(peak, batcher.waiting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return served, peak

    served, peak = run_on_fake_clock(work())
    assert served == 50
    assert 40 <= peak <= 50


def test_a_bulk_request_larger_than_its_part_leaves_interactive_requests_theirs() -> None:
    async def work() -> None:
        batcher = Batcher([Runner()], max_batch_size=4, max_delay_s=0.01, max_waiting=100, batch_share=0.5)
        with batcher.admit(90, priority=Priority.BATCH):  # alone it may exceed its part
            batcher.admit(50).close()
        assert batcher.waiting == 0

    run_on_fake_clock(work())


def test_a_caller_cannot_fill_the_queue_for_the_others_of_its_priority() -> None:
    async def work() -> None:
        batcher = Batcher([Runner()], max_batch_size=4, max_delay_s=0.01, max_waiting=100, caller_share=0.5)
        flood = [batcher.admit(10, caller="flood") for _ in range(5)]
        with pytest.raises(QueueFull):
            batcher.admit(1, caller="flood")
        other = batcher.admit(50, caller="other")
        with pytest.raises(QueueFull):
            batcher.admit(1, caller="third")
        for admission in (*flood, other):
            admission.close()
        with batcher.admit(90, caller="large"):  # alone it may exceed its share
            batcher.admit(10, caller="other").close()
        assert batcher.waiting == 0

    run_on_fake_clock(work())


@pytest.mark.parametrize("keys", [("k", "k"), ("agreement", "plain")])
@pytest.mark.parametrize("priority", list(Priority))
def test_a_single_box_waits_for_two_batches_beside_thousands_of_another_caller(
    priority: Priority, keys: tuple[str, str]
) -> None:
    async def work() -> list[float]:
        batcher: Batcher[str, str, str] = Batcher(
            [Runner(takes_s=0.02)], max_batch_size=16, max_delay_s=0.005, max_waiting=3000, batch_aging_s=2.0
        )
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(submit_as(batcher, priority, *["x"] * 1000, key=keys[0], caller="flood"))
            await asyncio.sleep(0.01)
            single = [await submit_as(batcher, priority, "x", key=keys[1], caller="single") for _ in range(5)]
        return [batch_slice.queue_s for slices in single for batch_slice in slices]

    assert max(run_on_fake_clock(work())) <= 0.041


def test_a_deadline_is_compared_with_the_turns_ahead_not_with_the_queue_of_others() -> None:
    async def work() -> None:
        batcher = Batcher([Runner(takes_s=1.0)], max_batch_size=4, max_delay_s=0.01, max_waiting=1000)
        await submit_as(batcher, Priority.INTERACTIVE, *"abcd", caller="flood")  # measured: a batch takes 1 s
        async with asyncio.TaskGroup() as group:
            group.create_task(submit_as(batcher, Priority.INTERACTIVE, *["x"] * 400, caller="flood"))
            await asyncio.sleep(0.5)
            with pytest.raises(QueueFull):
                batcher.admit(1, caller="flood", deadline=asyncio.get_running_loop().time() + 5)
            (batch_slice,) = await submit_as(batcher, Priority.INTERACTIVE, "y", caller="single", within_s=5.0)
            assert batch_slice.outcomes == ("k:y",)

    run_on_fake_clock(work())

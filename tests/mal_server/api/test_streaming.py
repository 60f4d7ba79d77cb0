"""`bounded_map`: contexts of responses end when the next response is asked for, however the stream ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from mal_server.api.streaming import bounded_map, each
from tests.mal_server.calls import collect


class Held:
    """Counts the responses whose context is open; the item "bad" fails, the item "slow" never ends."""

    def __init__(self) -> None:
        self.count = 0

    @asynccontextmanager
    async def handle(self, item: str) -> AsyncIterator[str]:
        if item == "bad":
            raise OSError(item)
        if item == "slow":
            await asyncio.Event().wait()
        self.count += 1
        try:
            yield item
        finally:
            self.count -= 1


def test_a_response_that_nobody_reads_is_held() -> None:
    async def work() -> list[int]:
        held, counts = Held(), []
        async with aclosing(bounded_map(each("abcdef"), held.handle, 3, idle_s=60.0)) as responses:
            async for _ in responses:
                for _ in range(10):
                    await asyncio.sleep(0)  # time for the others
                counts.append(held.count)
        return [*counts, held.count]

    counts = asyncio.run(work())
    assert 1 <= max(counts[:-1]) <= 3
    assert counts[-1] == 0


@pytest.mark.parametrize("items", [["a", "b", "slow"], ["a", "b", "c"]])
def test_nothing_is_held_after_a_stream_is_closed_early(items: list[str]) -> None:
    async def work() -> int:
        held = Held()
        async with aclosing(bounded_map(each(items), held.handle, 3, idle_s=60.0)) as responses:
            await anext(responses)
            for _ in range(10):
                await asyncio.sleep(0)
        return held.count

    assert asyncio.run(work()) == 0


def test_nothing_is_held_after_an_item_failed() -> None:
    async def work() -> int:
        held = Held()
        with pytest.raises(OSError, match="bad"):
            await collect(bounded_map(each(["a", "bad", "b"]), held.handle, 3, idle_s=60.0))
        return held.count

    assert asyncio.run(work()) == 0

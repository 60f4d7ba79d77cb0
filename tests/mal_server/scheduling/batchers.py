"""Batchers, runners and requests for tests on a fake clock."""

import asyncio
import math
from collections.abc import Sequence

from mal_server.scheduling.admission import BatchSlice
from mal_server.scheduling.batch_observer import NullObserver
from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.priority import Priority

Slices = list[BatchSlice[str]]


class Runner:
    """Returns "key:item" after `takes_s`; an item "bad" fails alone, a batch of key "broken" fails completely."""

    def __init__(self, takes_s: float = 1.0) -> None:
        self.takes_s = takes_s
        self.batches: list[list[str]] = []

    async def __call__(self, key: str, items: Sequence[str]) -> Sequence[str | Exception]:
        self.batches.append(list(items))
        await asyncio.sleep(self.takes_s)
        if key == "broken":
            raise OSError("device lost")
        if key == "short":
            return ["one"]
        return [ValueError(item) if item == "bad" else f"{key}:{item}" for item in items]


def batcher_of(*runners: Runner, size: int = 4, delay: float = 0.01, waiting: int = 100) -> Batcher[str, str, str]:
    return Batcher(runners, max_batch_size=size, max_delay_s=delay, max_waiting=waiting)


async def submit(batcher: Batcher[str, str, str], key: str, *items: str) -> Slices:
    with batcher.admit(len(items)) as admission:
        return [batch_slice async for batch_slice in admission.submit(key, items)]


def outcomes(slices: Slices) -> dict[int, str | Exception]:
    return {i: x for batch_slice in slices for i, x in zip(batch_slice.indices, batch_slice.outcomes, strict=True)}


class Counting(NullObserver):
    """Counts dropped items by reason."""

    def __init__(self) -> None:
        self.drops: dict[str, int] = {}

    def dropped(self, reason: str, count: int) -> None:
        self.drops[reason] = self.drops.get(reason, 0) + count


def batcher_with_aging(
    runner: Runner, *, size: int = 2, aging_s: float = 10.0, observer: Counting | None = None
) -> Batcher[str, str, str]:
    return Batcher(
        [runner],
        max_batch_size=size,
        max_delay_s=0.01,
        max_waiting=1000,
        max_bytes=1000,
        batch_aging_s=aging_s,
        observer=observer,
    )


async def submit_as(
    batcher: Batcher[str, str, str],
    priority: Priority,
    *items: str,
    key: str = "k",
    after_s: float = 0.0,
    within_s: float = math.inf,
    size_bytes: int = 0,
    caller: str = "",
) -> Slices:
    await asyncio.sleep(after_s)
    deadline = asyncio.get_running_loop().time() + within_s
    with batcher.admit(
        len(items), priority=priority, deadline=deadline, size_bytes=size_bytes, caller=caller
    ) as admission:
        return [batch_slice async for batch_slice in admission.submit(key, items)]

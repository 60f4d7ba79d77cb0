"""Calls that end in every way, many at once: afterwards the server counts nothing as held."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from mal.v1 import evaluation_pb2, labeling_pb2, types_pb2

from mal_server.api.receiving import ReceiveLimiter
from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.memory_limiter import MemoryLimiter
from mal_server.scheduling.memory_quota import MemoryQuota
from tests.mal_server.calls import until
from tests.mal_server.fakes import BrightPredictor, Running, encoded, label_request, serving

MIB = 2**20
LARGE = encoded(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8).repeat(32, 0).repeat(32, 1))
SETTINGS: dict[str, Any] = {
    "threads": 1,
    "max_decoded_bytes": 40 * MIB,
    "max_queue_bytes": 64 * MIB,
    "max_evaluation_bytes": 4 * MIB,
    "limits": {"max_items_in_flight": 4},
    "connections": {"max_calls": 50, "max_streams": 16, "receive_timeout_s": 0.3},
}


def instances(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[Any]:
    """Returns a list that receives every object of a class that is made from now on."""
    found: list[Any] = []
    init: Any = kind.__init__  # type: ignore[misc]

    def recorded(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        found.append(self)

    monkeypatch.setattr(kind, "__init__", recorded)
    return found


def request(chance: random.Random) -> labeling_pb2.LabelImageRequest:
    boxes = [
        chance.choice([(0.0, 0.0, 1280.0, 960.0), (0.0, 0.0, -1.0, 1.0)]) for _ in range(chance.choice([0, 1, 20]))
    ]
    resolve, content = chance.random() < 0.5, LARGE if chance.random() < 0.8 else b"damaged"
    return label_request(*boxes, content=content, resolve_overlaps=resolve)


async def items(chance: random.Random) -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
    for index in range(6):
        yield labeling_pb2.LabelImagesRequest(item_id=str(index), request=request(chance))


async def images(chance: random.Random) -> AsyncIterator[evaluation_pb2.EvaluateRequest]:
    yield evaluation_pb2.EvaluateRequest(options=evaluation_pb2.EvaluateOptions(want_records=True))
    instance = types_pb2.Instance(box=types_pb2.Box(width=1280, height=960))
    truths = [evaluation_pb2.GroundTruth(instance=instance)] * 3
    for index in range(6):
        source = request(chance).image
        image = evaluation_pb2.EvaluateImage(item_id=str(index), image=source, ground_truth=truths)
        yield evaluation_pb2.EvaluateRequest(image=image)


async def silence() -> AsyncIterator[labeling_pb2.LabelImageRequest]:
    await asyncio.sleep(3600)
    yield labeling_pb2.LabelImageRequest()


async def end_somehow(running: Running, chance: random.Random) -> None:
    """Starts a call of some kind, and reads, cancels or leaves it."""
    timeout = chance.choice([None, None, 0.1, 0.5])
    unsent = running.channel.stream_stream("/mal.v1.LabelingService/LabelImage")
    starts: list[Callable[[], Any]] = [
        lambda: running.labeling.LabelImage(request(chance), timeout=timeout),
        lambda: running.labeling.LabelImages(items(chance), timeout=timeout),
        lambda: running.evaluation.Evaluate(images(chance), timeout=timeout),
        lambda: unsent(silence(), timeout=timeout),
    ]
    call = chance.choice(starts)()
    if chance.random() < 0.5:
        asyncio.get_running_loop().call_later(chance.choice([0.05, 0.3, 1.0]), call.cancel)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        async for _ in call:
            pass


def test_nothing_is_held_after_calls_that_end_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (MemoryLimiter, MemoryQuota, Batcher, ReceiveLimiter)
    limiters, quotas, batchers, receivers = (instances(monkeypatch, kind) for kind in kinds)
    chance = random.Random(0)

    def held(running: Running) -> list[Any]:
        counts: list[Any] = [running.server.running_calls, *(limiter.used for limiter in (*limiters, *quotas))]
        counts += [count for batcher in batchers for count in (batcher.waiting, batcher.held_bytes)]
        counts += [held for receiver in receivers for held in (receiver._held, receiver._waiting)]
        return [count for count in counts if count]

    async def work() -> None:
        async with serving(BrightPredictor(wait_s=0.001), **SETTINGS) as running:
            await asyncio.gather(*(end_somehow(running, chance) for _ in range(60)))
            await until(lambda: not held(running))

    asyncio.run(work())
    assert len(limiters) == len(quotas) == len(batchers) == 1
    assert len(receivers) == 2

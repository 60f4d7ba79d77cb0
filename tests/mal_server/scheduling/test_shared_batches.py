"""Several clients on one device: shared batches, and the capacity that cancelled calls release."""

import asyncio
import threading
from typing import Any

import grpc
import numpy as np
import pytest
from mal.v1 import labeling_pb2_grpc, types_pb2

from tests.mal_server.calls import items, reason_of, status_details, until, waiting, with_server
from tests.mal_server.fakes import (
    DISC_BOX,
    BrightPredictor,
    Running,
    bright_disc,
    encoded,
    label,
    label_request,
    queued_items,
)


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return queued_items(monkeypatch)


def test_eight_clients_with_one_box_each_share_batches(queued: list[int]) -> None:
    gate = threading.Event()

    async def work(running: Running) -> list[int]:
        async def client(_: int) -> list[int]:
            async with grpc.aio.insecure_channel(running.server.address) as channel:
                stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
                return [a.timing.batch_size async for a in stub.LabelImage(label_request(DISC_BOX))]

        clients = [asyncio.create_task(client(number)) for number in range(8)]
        await until(lambda: len(queued) == 8)
        gate.set()
        return [size for sizes in await asyncio.gather(*clients) for size in sizes]

    sizes = with_server(work, BrightPredictor(gate=gate))
    # Requests that arrive while the first batch runs form the second one.
    first = min(sizes)
    assert sorted(sizes) in ([first] * first + [8 - first] * (8 - first), [8] * 8)


def test_boxes_of_different_images_in_one_batch_get_their_own_masks(queued: list[int]) -> None:
    gate = threading.Event()

    async def work(running: Running) -> list[list[types_pb2.InstanceResult]]:
        blocker = asyncio.create_task(label(running, label_request(DISC_BOX)))
        await until(lambda: running.predictor.batches)
        before = len(queued)
        shifted = np.roll(bright_disc(), 12, axis=1)
        requests = [label_request(DISC_BOX), label_request((30.0, 8.0, 24.0, 24.0), content=encoded(shifted))]
        tasks = [asyncio.create_task(label(running, request)) for request in requests]
        await until(lambda: len(queued) == before + 2)
        gate.set()
        await blocker
        return list(await asyncio.gather(*tasks))

    predictor = BrightPredictor(gate=gate)
    (here,), (there,) = with_server(work, predictor)
    assert [size for _, size in predictor.batches] == [1, 2]
    assert (there.mask_box.x - here.mask_box.x, there.area_px) == (12, here.area_px)


def test_cancelled_calls_do_not_stall_others() -> None:
    gate = threading.Event()

    async def work(running: Running) -> list[types_pb2.InstanceResult]:
        cancelled = running.labeling.LabelImage(label_request(*[DISC_BOX] * 3))
        reader = asyncio.create_task(cancelled.read())
        while not running.predictor.batches:
            await asyncio.sleep(0.001)
        queued = [running.labeling.LabelImage(label_request(*[DISC_BOX] * 3)) for _ in range(10)]
        readers = [asyncio.create_task(call.read()) for call in queued]
        await until(lambda: waiting(running) == 30)
        for call in (cancelled, *queued):
            call.cancel()
        await asyncio.gather(reader, *readers, return_exceptions=True)
        await until(lambda: waiting(running) == 0)
        gate.set()
        return await label(running, label_request(DISC_BOX))

    predictor = BrightPredictor(gate=gate)
    (result,) = with_server(work, predictor)
    assert result.area_px > 0
    assert [size for _, size in predictor.batches] == [3, 1]


def test_a_queued_call_past_its_deadline_never_runs() -> None:
    gate = threading.Event()

    async def work(running: Running) -> grpc.StatusCode:
        first = asyncio.create_task(label(running, label_request(DISC_BOX)))
        while not running.predictor.batches:
            await asyncio.sleep(0.001)
        call = running.labeling.LabelImage(label_request(*[DISC_BOX] * 3), timeout=0.1)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        await until(lambda: waiting(running) == 0)
        gate.set()
        await first
        await label(running, label_request(DISC_BOX))
        return raised.value.code()

    predictor = BrightPredictor(gate=gate)
    assert with_server(work, predictor) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert [size for _, size in predictor.batches] == [1, 1]


def test_cancelling_a_stream_removes_its_queued_items() -> None:
    gate = threading.Event()

    async def work(running: Running) -> list[int]:
        call = running.labeling.LabelImages(items(*[label_request(DISC_BOX, DISC_BOX)] * 8))
        reader = asyncio.create_task(call.read())
        await until(lambda: waiting(running) == 14)
        call.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await until(lambda: waiting(running) == 0)  # the device is still in its first batch
        gate.set()
        await label(running, label_request(DISC_BOX))
        return [size for _, size in running.predictor.batches]

    assert with_server(work, BrightPredictor(gate=gate), max_batch_size=2) == [2, 1]


def test_cancelling_a_large_request_releases_its_queue_capacity() -> None:
    """Over gRPC: a second large request is refused while the first one waits, and accepted once that is cancelled."""
    gate = threading.Event()
    large = label_request(*[DISC_BOX] * 40)

    async def work(running: Running) -> tuple[str, int, list[int]]:
        blocker = asyncio.create_task(label(running, label_request(DISC_BOX)))
        await until(lambda: running.predictor.batches)
        first = running.labeling.LabelImage(large)
        reading = asyncio.create_task(first.read())
        await until(lambda: waiting(running) == 40)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await label(running, large)
        first.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: waiting(running) == 0)
        second = asyncio.create_task(label(running, large))
        await until(lambda: waiting(running) == 40)
        gate.set()
        await blocker
        results = len(await second)
        return reason_of(status_details(raised.value)), results, [size for _, size in running.predictor.batches]

    settings: dict[str, Any] = {"max_queue_crops": 80, "max_batch_size": 40, "limits": {"max_boxes": 40}}
    assert with_server(work, BrightPredictor(gate=gate), **settings) == ("QUEUE_FULL", 40, [1, 40])

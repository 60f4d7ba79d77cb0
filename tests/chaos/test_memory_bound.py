"""Peak memory of a server under the worst valid requests: at most what is set.

Beside calls that are read, there are calls and streams that nobody reads, cancelled ones, and evaluations with crowds.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from mal.v1 import evaluation_pb2, evaluation_pb2_grpc, labeling_pb2, labeling_pb2_grpc, types_pb2

from benchmarks.load.run import fake_server
from mal_train.core.masks.rle import encode_mask
from tests.form import FORM, Form
from tests.mal_server.evaluation.test_run import message_of, options_of, truth_of
from tests.mal_server.fakes import encoded, label_request

MIB = 2**20
HW = FORM.pick((400, 600), (1000, 1500))
"""Size of the images. Their masks in every format take most of the CPU time; the flood below needs none of it."""
CROP = 224
BOXES = 8
FLOOD_BOXES = 100
BATCH_MS = 50
BUDGETS = {
    "max_queue_bytes": 64 * MIB,
    "max_decoded_bytes": 64 * MIB,
    "max_evaluation_bytes": 16 * MIB,
    "image_cache_bytes": 16 * MIB,
}
CONSTANT_MIB = 150
"""Beside the budgets: messages that gRPC receives and sends, one batch on the device, threads, and fragments."""

FORMATS = (
    types_pb2.MASK_FORMAT_COCO_RLE,
    types_pb2.MASK_FORMAT_UNCOMPRESSED_RLE,
    types_pb2.MASK_FORMAT_POLYGONS,
    types_pb2.MASK_FORMAT_PNG,
)


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def worst_requests() -> list[labeling_pb2.LabelImageRequest]:
    """Returns requests for all boxes over the whole image, in every format, with and without resolved overlaps."""
    noise = np.random.default_rng(0).integers(0, 256, (HW[0] // 20, HW[1] // 20, 3), dtype=np.uint8)
    content = encoded(np.ascontiguousarray(noise.repeat(20, axis=0).repeat(20, axis=1)))
    boxes = [(0.0, 0.0, float(HW[1]), float(HW[0]))] * BOXES
    return [
        label_request(*boxes, content=content, resolve_overlaps=resolve, compute_agreement=agreement, formats=FORMATS)
        for resolve in (False, True)
        for agreement in (False, True)
    ]


async def evaluation(request: labeling_pb2.LabelImageRequest) -> AsyncIterator[evaluation_pb2.EvaluateRequest]:
    """Yields images whose objects all lie under masks of crowds."""
    rows = np.arange(HW[0])[:, None] // 40 % 2 == np.arange(HW[1])[None, :] // 40 % 2
    crowd, box = encode_mask(rows), (0.0, 0.0, float(HW[1]), float(HW[0]))
    truths = [truth_of(number, box, 3, crowd, is_crowd=number > 1) for number in range(1, BOXES)]
    yield options_of()
    for number in range(3):
        yield message_of(f"image {number}", request.image.content, truths)


async def evaluated(channel: grpc.aio.Channel, request: labeling_pb2.LabelImageRequest) -> str:
    """Returns the status of an evaluation with crowds that is read to its end."""
    stub: Any = evaluation_pb2_grpc.EvaluationServiceStub(channel)
    try:
        async for _ in stub.Evaluate(evaluation(request)):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def items(request: labeling_pb2.LabelImageRequest) -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
    """Yields one image again and again."""
    for number in range(100):
        yield labeling_pb2.LabelImagesRequest(item_id=str(number), request=request)


async def answered(stub: Any, request: labeling_pb2.LabelImageRequest) -> str:
    """Returns the status of a call that is read to its end."""
    try:
        async for _ in stub.LabelImage(request):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


def flood_request() -> labeling_pb2.LabelImageRequest:
    """Returns a request that is cheap to send and to prepare, and whose crops take 15 MB until the device is free."""
    box = (0.0, 0.0, 8.0, 8.0)
    return label_request(*[box] * FLOOD_BOXES, content=encoded(np.zeros((8, 8, 3), np.uint8)))


async def storm(address: str, calls: int, cancelled: int, flood: int) -> list[str]:
    """Runs calls beside calls that nobody reads, cancelled ones and a flood; returns the statuses of the first."""
    requests = worst_requests()
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        unread = [stub.LabelImage(request) for request in requests]
        unread += [stub.LabelImages(items(request)) for request in requests[:2]]
        for number in range(cancelled):
            call = stub.LabelImage(requests[number % len(requests)])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(call.wait_for_connection(), 0.05)
            call.cancel()
        found = await asyncio.gather(
            evaluated(channel, requests[0]),
            *(answered(stub, requests[i % len(requests)]) for i in range(calls)),
            *(answered(stub, flood_request()) for _ in range(flood)),
        )
        for call in unread:
            call.cancel()
        # Once the others have left, there is room again.
        while (status := await answered(stub, requests[0])) == "UNAVAILABLE":
            await asyncio.sleep(0.05)
        return [*found, status]


@pytest.mark.promise("memory", "The peak memory of a server is bounded by its settings")
def test_the_peak_memory_is_bounded_by_the_settings(tmp_path: Path, form: Form, record: Callable[..., None]) -> None:
    settings = [f"{name}={value}" for name, value in BUDGETS.items()]
    # No other bound than that of the bytes ends the flood.
    given = ["--batch-ms", str(BATCH_MS), "--crop-size", str(CROP), *settings, "threads=2", "max_queue_crops=1000000"]
    with fake_server(tmp_path, *given) as server:
        pid = server.process.pid
        before = peak_mib(pid)
        statuses = asyncio.run(storm(server.address, form.pick(1, 60), form.pick(4, 1000), form.pick(60, 600)))
        peak = peak_mib(pid)
    budget = sum(BUDGETS.values()) / MIB
    record("peak memory", before_mib=before, peak_mib=peak, budget_mib=budget, answered=statuses.count("OK"))
    assert statuses[-1] == "OK"
    assert set(statuses) <= {"OK", "UNAVAILABLE"}
    assert peak - before <= budget + CONSTANT_MIB

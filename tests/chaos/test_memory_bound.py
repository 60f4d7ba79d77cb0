"""Peak memory of a server under the worst valid requests, slow readers and cancelled calls: at most what is set."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from mal.v1 import labeling_pb2, labeling_pb2_grpc, types_pb2

from benchmarks.load.run import fake_server
from tests.form import Form
from tests.mal_server.fakes import encoded, label_request

MIB = 2**20
HW = (1000, 1500)
CROP = 224
BOXES = 20
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


async def answered(stub: Any, request: labeling_pb2.LabelImageRequest) -> str:
    """Returns the status of a call that is read to its end."""
    try:
        async for _ in stub.LabelImage(request):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def storm(address: str, calls: int, cancelled: int) -> list[str]:
    """Runs calls beside calls that nobody reads and cancelled ones; returns the statuses of the first."""
    requests = worst_requests()
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        unread = [stub.LabelImage(request) for request in requests]
        for number in range(cancelled):
            call = stub.LabelImage(requests[number % len(requests)])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(call.wait_for_connection(), 0.05)
            call.cancel()
        found = await asyncio.gather(*(answered(stub, requests[i % len(requests)]) for i in range(calls)))
        for call in unread:
            call.cancel()
        # Once the others have left, there is room again.
        while (status := await answered(stub, requests[0])) == "UNAVAILABLE":
            await asyncio.sleep(0.05)
        return [*found, status]


def test_the_peak_memory_is_bounded_by_the_settings(tmp_path: Path, form: Form, record: Callable[..., None]) -> None:
    settings = [f"{name}={value}" for name, value in BUDGETS.items()]
    with fake_server(tmp_path, "--batch-ms", "1", "--crop-size", str(CROP), *settings, "threads=2") as server:
        pid = server.process.pid
        before = peak_mib(pid)
        statuses = asyncio.run(storm(server.address, form.pick(2, 60), form.pick(10, 1000)))
        peak = peak_mib(pid)
    budget = sum(BUDGETS.values()) / MIB
    record("memory", before_mib=before, peak_mib=peak, budget_mib=budget, answered=statuses.count("OK"))
    assert statuses[-1] == "OK"
    assert set(statuses) <= {"OK", "UNAVAILABLE"}
    assert peak - before <= budget + CONSTANT_MIB

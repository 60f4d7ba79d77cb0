"""Preparation of a request's image: one walk through its file, and memory for what its decoder really takes."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from mal.v1 import labeling_pb2, types_pb2

from mal_server.inference.image_store import FileImage, ImageStore
from mal_server.inference.pipeline import ENCODED_COPIES
from mal_server.inference.preparation import BOXES_PER_TASK
from mal_server.scheduling.memory_limiter import MemoryLease, MemoryLimiter
from mal_train.core.images import header
from mal_train.core.images.container import Container
from mal_train.core.images.header import read_container
from mal_train.core.masks.geometry import inference_window, resizing_bytes
from mal_train.core.settings import LabelerConfig
from tests.mal_server.calls import reason_of, status_details, until, with_server
from tests.mal_server.fakes import DISC_BOX, DISC_PNG, BrightPredictor, Running, encoded, label, label_request

LARGE = np.zeros((1200, 1600, 3), np.uint8)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that receives the size of each file that is walked through."""
    found: list[int] = []
    walk = header._walk

    def counted(data: bytes, name: str) -> Container:
        found.append(len(data))
        return walk(data, name)

    monkeypatch.setattr(header, "_walk", counted)
    return found


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that receives the bytes that each large request acquires."""
    found: list[int] = []
    acquire = MemoryLimiter.acquire

    async def recorded(limiter: MemoryLimiter, size: int, *options: Any) -> MemoryLease:
        found.append(size)
        return await acquire(limiter, size, *options)

    monkeypatch.setattr(MemoryLimiter, "acquire", recorded)
    return found


@pytest.mark.parametrize(
    ("content", "boxes"), [(DISC_PNG, 1), (DISC_PNG, BOXES_PER_TASK + 1), (encoded(LARGE, "WEBP"), 1)]
)
def test_the_header_of_an_image_is_read_once(content: bytes, boxes: int, walks: list[int]) -> None:
    def work(running: Running) -> Any:
        return label(running, label_request(*[DISC_BOX] * boxes, content=content))

    with_server(work)
    assert walks == [len(content)]


@pytest.mark.parametrize(("image_format", "bytes_per_px"), [("WEBP", 16), ("BMP", 10)])
def test_a_large_image_acquires_the_memory_of_its_format(
    image_format: str, bytes_per_px: int, leases: list[int]
) -> None:
    content = encoded(LARGE, image_format)
    with_server(lambda running: label(running, label_request(DISC_BOX, content=content)))
    assert leases == [read_container(content).peak_bytes]
    assert leases[0] == pytest.approx(bytes_per_px * LARGE.size / 3, rel=0.05)


@pytest.mark.parametrize("size_wh", [(3000, 2400), (500, 16_000)])
def test_cutting_a_large_window_acquires_memory_until_the_last_crop(
    size_wh: tuple[int, int], leases: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    width, height = size_wh
    predictor = BrightPredictor()
    predictor.config = LabelerConfig(crop_size=512, margin_rate=4.0, mask_thres=(0.5, 0.5, 0.5))
    kept: list[int] = []
    shrink = MemoryLease.shrink

    def recorded(lease: MemoryLease, size: int) -> None:
        kept.append(size)
        shrink(lease, size)

    monkeypatch.setattr(MemoryLease, "shrink", recorded)
    box = (0.0, 0.0, float(width), float(height))
    content = encoded(np.zeros((height, width, 3), np.uint8))
    with_server(lambda running: label(running, label_request(box, content=content)), predictor)
    assert min(leases[0], kept[0]) >= 3 * width * height + resizing_bytes(inference_window(box, 4.0), 512)


def test_a_refused_image_acquires_no_memory(leases: list[int]) -> None:
    async def work(running: Running) -> None:
        request = label_request(DISC_BOX, content=b"\xff\xd8\xff" + b"\xff\xe3\x00\x02" * 50_000)
        with pytest.raises(Exception, match="segments"):
            await label(running, request)

    with_server(work)
    assert leases == []


def test_a_large_file_is_read_only_while_it_holds_memory_for_its_bytes_too(
    tmp_path: Path, leases: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each of a thousand waiting requests of 100 bytes would hold a file of 32 MiB."""
    content = encoded(LARGE, "BMP")
    (tmp_path / "large.bmp").write_bytes(content)
    leases_at_reading: list[int] = []
    read = ImageStore.read

    def recorded(store: ImageStore, source: FileImage) -> bytes:
        leases_at_reading.append(len(leases))
        return read(store, source)

    monkeypatch.setattr(ImageStore, "read", recorded)
    with_server(lambda running: label(running, file_request("large.bmp")), data_folders=folders(tmp_path))
    assert leases == [read_container(content).peak_bytes + len(content)]
    assert leases_at_reading == [0, 1]


def test_a_file_that_grows_while_its_request_waits_is_refused(
    tmp_path: Path, leases: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.bmp"
    path.write_bytes(encoded(LARGE, "BMP"))
    acquire = MemoryLimiter.acquire

    async def replaced(limiter: MemoryLimiter, size: int, *options: Any) -> MemoryLease:
        path.write_bytes(encoded(np.zeros((2400, 1600, 3), np.uint8), "BMP"))
        return await acquire(limiter, size, *options)

    monkeypatch.setattr(MemoryLimiter, "acquire", replaced)

    async def work(running: Running) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await label(running, file_request("large.bmp"))
        return reason_of(status_details(caught.value))

    assert with_server(work, data_folders=folders(tmp_path)) == "IMAGE_DECODE_FAILED"


def folders(path: Path) -> list[dict[str, str]]:
    return [{"name": "photos", "path": str(path)}]


def file_request(name: str) -> labeling_pb2.LabelImageRequest:
    request = label_request(DISC_BOX)
    request.image.CopyFrom(types_pb2.ImageSource(uri=f"photos/{name}"))
    return request


def test_the_file_of_a_request_is_counted_however_many_boxes_are_invalid() -> None:
    gate = threading.Event()
    content = DISC_PNG + bytes(1_000_000)
    held: list[int] = []

    async def work(running: Running) -> None:
        batcher = running.server._models.get().batcher
        call = asyncio.ensure_future(
            label(running, label_request(*[(0.0, 0.0, -1.0, 1.0)] * 99, DISC_BOX, content=content))
        )
        await until(lambda: len(running.predictor.batches) == 1)  # 99 boxes have failed, one is on the device
        held.append(batcher.held_bytes)
        gate.set()
        await call
        await until(lambda: batcher.held_bytes == 0)

    with_server(work, BrightPredictor(gate=gate))
    assert held[0] >= ENCODED_COPIES * len(content)

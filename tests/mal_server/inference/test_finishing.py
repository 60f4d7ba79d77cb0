"""Memory of pasted masks: counted by the limiter before it is taken, and given back however the request ends."""

import asyncio
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from mal.v1 import labeling_pb2, types_pb2

from mal_server.inference.finishing import MASK_BYTES_PER_PIXEL, OUTLINE_BYTES_PER_PIXEL
from mal_server.inference.preparation import MAX_SMALL_BYTES
from mal_server.scheduling.memory_limiter import MemoryLimiter
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.clicks import correcting_bytes
from mal_train.kernel.labeler.overlaps import OWNER_BYTES_PER_PIXEL
from mal_train.kernel.labeler.types import Crop, Label, Prediction
from tests.mal_server.calls import reason_of, refusal, until, with_server
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, Running, encoded, label, label_request

SIDE = 1000
BOX = (0.0, 0.0, float(SIDE), float(SIDE))
CONTENT = encoded(np.full((SIDE, SIDE, 3), 230, np.uint8))


def with_points(request: labeling_pb2.LabelImageRequest) -> labeling_pb2.LabelImageRequest:
    """Returns a copy of a request with two points in its first box."""
    changed = labeling_pb2.LabelImageRequest()
    changed.CopyFrom(request)
    for x in (20.5, 25.5):
        changed.instances[0].points.add(x=x, y=15.5, label=types_pb2.POINT_LABEL_NEGATIVE)
    return changed


class Recorded:
    """Sizes that were acquired, and bytes that are held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.limiters: set[MemoryLimiter] = set()
        acquire = MemoryLimiter.acquire

        async def recorded(limiter: MemoryLimiter, size: int, *options: Any) -> Any:
            self.sizes.append(size)
            self.limiters.add(limiter)
            return await acquire(limiter, size, *options)

        monkeypatch.setattr(MemoryLimiter, "acquire", recorded)

    @property
    def used(self) -> int:
        return sum(limiter.used for limiter in self.limiters)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


def test_large_masks_are_counted_one_for_each_step(memory: Recorded) -> None:
    results = with_server(lambda running: label(running, label_request(BOX, BOX, content=CONTENT)))
    assert [result.area_px for result in results] == [SIDE**2] * 2
    assert SIDE**2 * MASK_BYTES_PER_PIXEL > MAX_SMALL_BYTES
    assert memory.sizes == [SIDE**2 * MASK_BYTES_PER_PIXEL] * 2
    assert memory.used == 0


@pytest.mark.parametrize("resolve", [False, True])
def test_masks_with_points_are_counted_with_their_correction(memory: Recorded, resolve: bool) -> None:
    pixels = BrightPredictor().config.crop_size ** 2
    owner_bytes = resolve * OWNER_BYTES_PER_PIXEL
    with_server(
        lambda running: label(running, with_points(label_request(BOX, content=CONTENT, resolve_overlaps=resolve)))
    )
    assert memory.sizes[-1] == SIDE**2 * (MASK_BYTES_PER_PIXEL + owner_bytes) + correcting_bytes(2, pixels)
    assert memory.used == 0


@pytest.mark.parametrize("resolve", [False, True])
def test_the_crop_of_a_box_with_points_is_counted_until_the_request_ends(resolve: bool) -> None:
    plain = label_request(DISC_BOX, DISC_BOX, resolve_overlaps=resolve)

    async def work(running: Running, request: labeling_pb2.LabelImageRequest) -> float:
        asked = asyncio.create_task(label(running, request))
        await until(lambda: bool(running.predictor.batches))
        held = running.server.registry.get_sample_value("mal_queue_bytes")
        gate.set()
        await asked
        assert held is not None
        return held

    held = []
    for request in (plain, with_points(plain)):
        gate = threading.Event()
        held.append(with_server(partial(work, request=request), BrightPredictor(gate=gate)))
    assert held[1] - held[0] == 3 * BrightPredictor().config.crop_size ** 2


def test_polygons_are_counted_with_the_rings_of_the_finest_mask(memory: Recorded) -> None:
    side = BrightPredictor().config.crop_size
    request = label_request(BOX, content=CONTENT, formats=[types_pb2.MASK_FORMAT_POLYGONS])
    with_server(lambda running: label(running, request))
    assert memory.sizes[-1] == SIDE**2 * MASK_BYTES_PER_PIXEL + side**2 * OUTLINE_BYTES_PER_PIXEL
    assert memory.used == 0


def test_resolved_overlaps_count_the_image_and_one_mask_however_many_boxes_there_are(memory: Recorded) -> None:
    request = label_request(*[BOX] * 8, content=CONTENT, resolve_overlaps=True)
    results = with_server(lambda running: label(running, request))
    assert [result.area_px for result in results] == [SIDE**2] * 8  # each lies within the others
    assert memory.sizes == [SIDE**2 * (OWNER_BYTES_PER_PIXEL + MASK_BYTES_PER_PIXEL)]
    assert memory.used == 0


class Stuck(BrightPredictor):
    """Waits for `unstuck` in every mask that it finishes."""

    def __init__(self) -> None:
        super().__init__()
        self.unstuck = threading.Event()
        self.finishing = threading.Event()

    def finish(self, crop: Crop, prediction: Prediction, **options: Any) -> Label:
        if crop.image_hw == (SIDE, SIDE):
            self.finishing.set()
            assert self.unstuck.wait(60)
        return super().finish(crop, prediction, **options)


@pytest.mark.parametrize("resolve", [False, True])
def test_memory_is_held_until_the_thread_of_a_cancelled_call_is_done(memory: Recorded, resolve: bool) -> None:
    predictor = Stuck()

    async def work(running: Running) -> None:
        call = running.labeling.LabelImage(label_request(BOX, BOX, content=CONTENT, resolve_overlaps=resolve))
        reader = asyncio.create_task(call.read())
        await until(predictor.finishing.is_set)
        call.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        held = running.server.registry.get_sample_value("mal_queue_bytes")
        while held:
            await asyncio.sleep(0.001)
            held = running.server.registry.get_sample_value("mal_queue_bytes")
        assert memory.used > 0
        predictor.unstuck.set()
        await until(lambda: memory.used == 0)

    with_server(work, predictor, threads=1)


class Noisy(BrightPredictor):
    """Predicts noise, whose masks take many bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = LabelerConfig(crop_size=224, mask_thres=(0.5, 0.5, 0.5))

    def predict(self, crops: Sequence[Crop], options: Any = None) -> list[Prediction]:
        rng = np.random.default_rng(0)
        return [Prediction(rng.random((224, 224), dtype=np.float32)) for _ in crops]


def test_masks_that_exceed_a_message_are_refused_while_they_are_made() -> None:
    request = label_request(
        *[BOX] * 4,
        content=CONTENT,
        resolve_overlaps=True,
        formats=[types_pb2.MASK_FORMAT_COCO_RLE, types_pb2.MASK_FORMAT_UNCOMPRESSED_RLE],
    )
    code, status, _ = refusal(
        lambda running: label(running, request), Noisy(), limits={"max_response_bytes": 1024 * 1024}
    )
    assert (code, reason_of(status)) == (grpc.StatusCode.INVALID_ARGUMENT, "RESPONSE_TOO_LARGE")

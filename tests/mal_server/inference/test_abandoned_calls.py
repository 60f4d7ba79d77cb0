"""Cancelling a call ends its CPU work, although a running thread cannot be interrupted."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from mal_server.inference.preparation import BOXES_PER_TASK
from mal_train.core.errors import BadBox
from mal_train.core.images.decoder import RgbImage
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.image_patch import ImagePatch
from mal_train.core.masks.points import Point
from mal_train.kernel.labeler.types import Crop
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, Running, label, label_request, serving


class BlockedPredictor(BrightPredictor):
    """Counts the boxes that it cuts; once armed, cutting blocks until `gate_cut` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes_cut = 0
        self.is_armed = False
        self.started = threading.Event()
        self.gate_cut = threading.Event()

    def prepare(
        self,
        image: RgbImage | ImagePatch,
        boxes: Sequence[Sequence[float]],
        *,
        first: int = 0,
        points: Sequence[Sequence[Point]] | None = None,
    ) -> list[Crop | BadBox]:
        if self.is_armed:
            self.boxes_cut += len(boxes)
            self.started.set()
            self.gate_cut.wait(20)
        return super().prepare(image, boxes, first=first, points=points)


async def until_counted(running: Running, code: str) -> None:
    """Waits until the metrics count a call that ended with this code."""
    while not any(
        sample.name == "grpc_server_handled_total" and code in sample.labels.values() and sample.value
        for metric in running.server.registry.collect()
        for sample in metric.samples
    ):
        await asyncio.sleep(0.005)


def test_cancelling_a_call_stops_the_cutting_of_its_boxes() -> None:
    predictor = BlockedPredictor()

    async def work() -> int:
        async with serving(predictor, threads=1) as running:
            predictor.is_armed = True
            call = running.labeling.LabelImage(label_request(*[DISC_BOX] * 800))
            reading = asyncio.ensure_future(call.read())
            await asyncio.to_thread(predictor.started.wait, 20)
            call.cancel()
            await asyncio.wait_for(until_counted(running, "CANCELLED"), 20)
            predictor.gate_cut.set()
            # The only thread is free for this call without cutting all 800 boxes first.
            await label(running, label_request(DISC_BOX))
            with pytest.raises(asyncio.CancelledError):
                await reading
            return predictor.boxes_cut

    assert asyncio.run(work()) == BOXES_PER_TASK + 1


def test_boxes_cut_in_several_tasks_keep_their_numbers_and_order() -> None:
    bad: Box = (0.0, 0.0, -1.0, 5.0)
    boxes = [DISC_BOX, bad, *[DISC_BOX] * (2 * BOXES_PER_TASK), bad]

    async def work() -> list[int]:
        async with serving() as running:
            results = await label(running, label_request(*boxes))
            assert [result.instance_id for result in results] == list(range(len(boxes)))
            return [result.instance_id for result in results if result.status.code]

    assert asyncio.run(work()) == [1, len(boxes) - 1]

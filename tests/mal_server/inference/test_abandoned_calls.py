"""A caller that goes away ends the work on the CPU too, which no thread can be made to stop."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from mal_server.inference.pipeline import PREPARED_AT_ONCE
from mal_train.core.errors import BadBox
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.images import RgbImage
from mal_train.kernel.labeler.labeler import Crop
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, Running, label, label_request, serving


class SlowlyCut(BrightPredictor):
    """Counts the boxes that it cuts; once armed, the first ones wait for `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = 0
        self.armed = False
        self.begun = threading.Event()
        self.go = threading.Event()

    def prepare(self, image: RgbImage, boxes: Sequence[Sequence[float]], *, first: int = 0) -> list[Crop | BadBox]:
        if self.armed:
            self.cut += len(boxes)
            self.begun.set()
            self.go.wait(20)
        return super().prepare(image, boxes, first=first)


async def until_counted(running: Running, code: str) -> None:
    """Waits until the server has seen a call end so."""
    while not any(
        sample.name == "grpc_server_handled_total" and code in sample.labels.values() and sample.value
        for metric in running.server.registry.collect()
        for sample in metric.samples
    ):
        await asyncio.sleep(0.005)


def test_a_caller_that_goes_away_stops_the_cutting_of_its_boxes() -> None:
    predictor = SlowlyCut()

    async def work() -> int:
        async with serving(predictor, threads=1) as running:
            predictor.armed = True
            call = running.labeling.LabelImage(label_request(*[DISC_BOX] * 800))
            answer = asyncio.ensure_future(call.read())
            await asyncio.to_thread(predictor.begun.wait, 20)
            call.cancel()
            await asyncio.wait_for(until_counted(running, "CANCELLED"), 20)
            predictor.go.set()
            # The only thread is free for this one: not before 800 boxes were cut, otherwise.
            await label(running, label_request(DISC_BOX))
            with pytest.raises(asyncio.CancelledError):
                await answer
            return predictor.cut

    assert asyncio.run(work()) == PREPARED_AT_ONCE + 1


def test_boxes_that_are_cut_in_pieces_keep_their_numbers_and_their_order() -> None:
    bad: Box = (0.0, 0.0, -1.0, 5.0)
    boxes = [DISC_BOX, bad, *[DISC_BOX] * (2 * PREPARED_AT_ONCE), bad]

    async def work() -> list[int]:
        async with serving() as running:
            results = await label(running, label_request(*boxes))
            assert [result.instance_id for result in results] == list(range(len(boxes)))
            return [result.instance_id for result in results if result.status.code]

    assert asyncio.run(work()) == [1, len(boxes) - 1]

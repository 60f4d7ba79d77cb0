"""LabelImages: a stream of items, each with one response, in any order."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator
from typing import Any

from mal.v1 import labeling_pb2, model_pb2

from mal_train.core.masks.rle import Rle
from mal_train.kernel.labeler.types import Label
from tests.mal_server.calls import bulk, collect, fields_of, reason_of, until, waiting, with_server
from tests.mal_server.fakes import (
    DISC_BOX,
    BrightPredictor,
    Running,
    label_request,
)


def test_every_item_of_a_stream_has_one_response_with_its_own_errors() -> None:
    good = label_request(DISC_BOX, (0, 0, -1, 1))
    requests = [good, label_request(DISC_BOX, content=b"no image"), label_request(DISC_BOX, threshold=3.0), good]
    responses = with_server(lambda running: bulk(running, *requests))
    assert sorted(responses) == [f"item {i}" for i in range(4)]
    assert [responses[f"item {i}"].status.code for i in range(4)] == [0, 3, 3, 0]
    assert reason_of(responses["item 1"].status) == "IMAGE_FORMAT"
    assert fields_of(responses["item 2"].status) == ["request.options.threshold"]
    assert [len(responses[f"item {i}"].response.results) for i in range(4)] == [2, 0, 0, 2]


def test_all_results_of_an_item_are_in_one_message() -> None:
    responses = with_server(lambda running: bulk(running, label_request(*[DISC_BOX] * 20)), max_batch_size=8)
    response = responses["item 0"].response
    assert len(response.results) == 20
    assert response.timing.batch_size == 8


def test_a_long_item_id_is_an_error_of_its_item() -> None:
    async def work(running: Running) -> Any:
        async def stream() -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
            yield labeling_pb2.LabelImagesRequest(item_id="é" * 200, request=label_request(DISC_BOX))

        return [response async for response in running.labeling.LabelImages(stream())]

    (response,) = with_server(work)
    assert fields_of(response.status) == ["item_id"]
    assert response.item_id == "é" * 128


def test_a_stream_reads_no_further_than_its_window() -> None:
    gate = threading.Event()
    sent: list[int] = []

    async def work(running: Running) -> int:
        async def stream() -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
            for index in range(40):
                sent.append(index)
                yield labeling_pb2.LabelImagesRequest(item_id=str(index), request=label_request(DISC_BOX))

        call = running.labeling.LabelImages(stream())
        collected = asyncio.create_task(collect(call))
        await until(lambda: running.predictor.batches and len(sent) > 3)
        await until(lambda: sum(size for _, size in running.predictor.batches) + waiting(running) >= 3)
        for _ in range(50):  # other calls are served meanwhile, so further items could have been read
            await running.model.ListModels(model_pb2.ListModelsRequest())
        started = running.predictor.batches[0][1] + waiting(running)
        gate.set()
        assert len(await collected) == 40
        return started

    assert with_server(work, BrightPredictor(gate=gate), limits={"max_items_in_flight": 3}) == 3


def test_items_finish_in_any_order() -> None:
    gate = threading.Event()

    async def work(running: Running) -> list[str]:
        async def stream() -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
            yield labeling_pb2.LabelImagesRequest(item_id="slow", request=label_request(*[DISC_BOX] * 40))
            yield labeling_pb2.LabelImagesRequest(item_id="refused", request=label_request(content=b""))

        item_ids = []
        async for response in running.labeling.LabelImages(stream()):
            item_ids.append(response.item_id)
            gate.set()
        return item_ids

    assert with_server(work, BrightPredictor(gate=gate), max_batch_size=4) == ["refused", "slow"]


class LargeMasks(BrightPredictor):
    """A predictor whose masks take 100 kB each."""

    def finish(self, crop: Any, prediction: Any, **options: Any) -> Label:
        label = super().finish(crop, prediction, **options)
        return dataclasses.replace(label, rle=Rle(label.rle.height, label.rle.width, bytes(100_000)))


def test_an_item_whose_masks_exceed_a_message_has_the_reason_response_too_large() -> None:
    requests = [label_request(*[DISC_BOX] * 11), label_request(DISC_BOX)]
    responses = with_server(
        lambda running: bulk(running, *requests), LargeMasks(), limits={"max_response_bytes": 1 << 20}
    )
    assert fields_of(responses["item 0"].status) == ["request.instances"]
    assert reason_of(responses["item 0"].status) == "RESPONSE_TOO_LARGE"
    assert len(responses["item 1"].response.results) == 1

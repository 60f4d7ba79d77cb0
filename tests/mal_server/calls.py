"""Calls of a server with a fake predictor, and readers of its responses and errors."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from mal.v1 import labeling_pb2, model_pb2, types_pb2
from PIL import Image

from mal_train.core.masks import rle
from mal_train.core.masks.polygons import fill
from mal_train.core.masks.rle import Rle, decode_mask
from tests.mal_server.fakes import (
    BrightPredictor,
    Running,
    serving,
)

T = TypeVar("T")
Work = Callable[[Running], Awaitable[Any]]


def with_server(work: Work, predictor: BrightPredictor | None = None, **settings: Any) -> Any:
    async def run() -> Any:
        async with serving(predictor, **settings) as running:
            return await asyncio.wait_for(work(running), 60)

    return asyncio.run(run())


def refusal(
    call: Callable[[Running], Awaitable[Any]], predictor: BrightPredictor | None = None, **settings: Any
) -> Any:
    """Returns (code, rich status, trailers) of a call that must fail; asserts that the server still responds."""

    async def work(running: Running) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(running)
        await running.model.GetServerInfo(model_pb2.GetServerInfoRequest())
        return raised.value

    error = with_server(work, predictor, **settings)
    return error.code(), status_details(error), dict(error.trailing_metadata())


def status_details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """Returns the rich status of an error; an empty one if gRPC itself rejected the call."""
    trailers: dict[str, Any] = dict(error.trailing_metadata())  # type: ignore[arg-type]
    return status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))


def reason_of(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in status.details if detail.Unpack(info)), "")


def fields_of(status: status_pb2.Status) -> list[str]:
    bad = error_details_pb2.BadRequest()
    return [violation.field for detail in status.details if detail.Unpack(bad) for violation in bad.field_violations]


def mask_of(result: types_pb2.InstanceResult) -> Any:
    code = result.masks[0].coco_rle
    return decode_mask(Rle(code.height, code.width, code.counts))


def decoded(mask: types_pb2.Mask) -> Rle:
    """Returns the run-length encoding of a mask message, read by its field comments alone."""
    if mask.HasField("coco_rle"):
        return Rle(mask.coco_rle.height, mask.coco_rle.width, mask.coco_rle.counts)
    if mask.HasField("uncompressed_rle"):
        runs = mask.uncompressed_rle
        return rle.encode_runs(list(runs.counts), runs.height, runs.width)
    if mask.HasField("polygons"):
        rings = [np.reshape(ring.points, (-1, 2)) for ring in mask.polygons.rings]
        return rle.encode_mask(fill(rings, mask.polygons.height, mask.polygons.width))
    png = mask.png
    with Image.open(io.BytesIO(png.content)) as image:
        return rle.encode_region(np.asarray(image), png.y, png.x, (png.height, png.width))


def items(
    *requests: labeling_pb2.LabelImageRequest,
) -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
    async def stream() -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
        for index, request in enumerate(requests):
            yield labeling_pb2.LabelImagesRequest(item_id=f"item {index}", request=request)

    return stream()


async def bulk(running: Running, *requests: labeling_pb2.LabelImageRequest) -> dict[str, Any]:
    responses = [response async for response in running.labeling.LabelImages(items(*requests))]
    assert len(responses) == len({response.item_id for response in responses})
    return {response.item_id: response for response in responses}


UNSENT = ("Internal error from Core", "Locally cancelled by application!")
"""Details of grpc.aio's own errors for a stream that the server refuses while the client still sends: the status of the
server is lost, in 1 of 700 such calls and more often on a loaded machine."""


async def until_sent(call: Callable[[], Awaitable[T]]) -> T:
    """Makes a call of which the server may refuse the stream, again if grpc.aio lost the status."""
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.details() not in UNSENT:
                raise


async def until(condition: Callable[[], object]) -> None:
    """Waits for a condition without a time limit of its own: slow machines pass, and the test's timeout applies."""
    while not condition():
        await asyncio.sleep(0.001)


async def collect(call: Any) -> list[Any]:
    return [response async for response in call]


def waiting(running: Running) -> int:
    return running.server.waiting

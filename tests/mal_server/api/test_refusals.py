"""Rejected and failed calls: status, details and log."""

import asyncio
import threading
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from mal.v1 import labeling_pb2, types_pb2

from mal_train.core.errors import DeviceError
from tests.mal_server.calls import bulk, collect, fields_of, reason_of, refusal, until, waiting, with_server
from tests.mal_server.fakes import (
    DISC_BOX,
    DISC_PNG,
    BrightPredictor,
    Running,
    label,
    label_request,
)
from tests.mal_server.random_requests import REQUESTS


def violating(**changes: Any) -> labeling_pb2.LabelImageRequest:
    request = label_request(DISC_BOX)
    request.MergeFrom(labeling_pb2.LabelImageRequest(**changes))
    return request


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (labeling_pb2.LabelImageRequest(), "image.content"),
        (label_request(DISC_BOX, DISC_BOX, ids=[4, 4]), "instances[1].instance_id"),
        (violating(instances=[types_pb2.Instance(instance_id=9)]), "instances[1].box"),
        (violating(options=types_pb2.LabelOptions(threshold=0.0)), "options.threshold"),
        (violating(options=types_pb2.LabelOptions(polygon_tolerance_px=-1.0)), "options.polygon_tolerance_px"),
        (violating(options=types_pb2.LabelOptions(polygon_tolerance_px=float("nan"))), "options.polygon_tolerance_px"),
        (violating(options=types_pb2.LabelOptions(polygon_tolerance_px=float("inf"))), "options.polygon_tolerance_px"),
        (violating(options=types_pb2.LabelOptions(min_component_area_px=-1)), "options.min_component_area_px"),
        (violating(options=types_pb2.LabelOptions(formats=[types_pb2.MASK_FORMAT_UNSPECIFIED])), "options.formats"),
        (violating(options=types_pb2.LabelOptions(formats=[types_pb2.MASK_FORMAT_PNG] * 2)), "options.formats"),
        (violating(options=types_pb2.LabelOptions(threshold=float("nan"))), "options.threshold"),
        (violating(options=types_pb2.LabelOptions(branch=17)), "options.branch"),  # type: ignore[arg-type]
        (violating(image=types_pb2.ImageSource(expected_width=60)), "image.expected_width"),
        (violating(image=types_pb2.ImageSource(expected_width=-60, expected_height=-40)), "image.expected_width"),
        (label_request(*[DISC_BOX] * 6), "instances"),
    ],
)
def test_a_field_that_breaks_the_contract_is_named(request_: labeling_pb2.LabelImageRequest, field: str) -> None:
    code, status, _ = refusal(lambda running: label(running, request_), limits={"max_boxes": 5})
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields_of(status) == [field]


def test_all_wrong_fields_are_named_at_once() -> None:
    request = label_request(DISC_BOX, DISC_BOX, ids=[1, 1], threshold=2.0)
    _, status, _ = refusal(lambda running: label(running, request))
    assert fields_of(status) == ["instances[1].instance_id", "options.threshold"]


def test_a_rotated_image_is_an_error_and_gives_no_shifted_mask() -> None:
    request = label_request(DISC_BOX)
    request.image.expected_width, request.image.expected_height = 40, 60
    code, status, _ = refusal(lambda running: label(running, request))
    assert (code, reason_of(status)) == (grpc.StatusCode.INVALID_ARGUMENT, "IMAGE_SIZE_MISMATCH")


def test_a_full_queue_is_unavailable_with_a_time_to_retry() -> None:
    gate = threading.Event()

    async def call(running: Running) -> None:
        first = asyncio.create_task(label(running, label_request(*[DISC_BOX] * 5)))
        while not running.predictor.batches:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(label(running, label_request(*[DISC_BOX] * 5)))
        await until(lambda: waiting(running) == 5)
        try:
            await label(running, label_request(DISC_BOX))
        finally:
            gate.set()
            assert len(await first) == len(await second) == 5

    code, status, trailers = refusal(
        call, BrightPredictor(gate=gate), max_batch_size=5, max_queue_crops=10, limits={"max_boxes": 5}
    )
    assert (code, reason_of(status)) == (grpc.StatusCode.UNAVAILABLE, "QUEUE_FULL")
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert int(trailers["grpc-retry-pushback-ms"]) == retry.retry_delay.ToMilliseconds() > 0


def test_an_unexpected_error_is_an_id_for_the_client_and_a_traceback_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    predictor = BrightPredictor(error=ZeroDivisionError("secret detail"))
    code, status, _ = refusal(lambda running: label(running, label_request(DISC_BOX)), predictor)
    assert (code, reason_of(status)) == (grpc.StatusCode.INTERNAL, "UNEXPECTED")
    assert "secret" not in status.message
    error_id = status.message.split()[-1]
    record = next(record for record in caplog.records if error_id in record.getMessage())
    assert record.exc_info is not None


def test_a_device_that_fails_on_a_batch_is_logged_once_and_reported_for_each_box(
    caplog: pytest.LogCaptureFixture,
) -> None:
    predictor = BrightPredictor(error=DeviceError("the card is on fire"))
    results = with_server(lambda running: label(running, label_request(*[DISC_BOX] * 3, (0, 0, 0, 0))), predictor)
    assert [result.status.code for result in results] == [code_pb2.INTERNAL] * 3 + [code_pb2.INVALID_ARGUMENT]
    assert len({result.status.message for result in results[:3]}) == 1
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_a_message_above_the_limit_is_the_only_resource_exhausted() -> None:
    content = DISC_PNG + bytes(1024 * 1024)
    code, _, _ = refusal(
        lambda running: label(running, label_request(DISC_BOX, content=content)),
        limits={"max_request_bytes": 1024 * 1024},
    )
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x0a\x05ab"])
@pytest.mark.parametrize(
    "method", ["LabelingService/LabelImage", "LabelingService/LabelImages", "ModelService/GetServerInfo"]
)
def test_a_malformed_message_is_an_invalid_argument(method: str, data: bytes) -> None:
    async def call(running: Running) -> None:
        path = f"/mal.v1.{method}"
        if method.endswith("Info"):
            await running.channel.unary_unary(path)(data)
        elif method.endswith("Image"):
            await collect(running.channel.unary_stream(path)(data))
        else:
            await collect(running.channel.stream_stream(path)(iter([data])))

    code, status, _ = refusal(call)
    assert (code, fields_of(status)) == (grpc.StatusCode.INVALID_ARGUMENT, [""])


@given(st.lists(REQUESTS, min_size=20, max_size=20))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_no_request_causes_an_internal_error(requests: list[labeling_pb2.LabelImageRequest]) -> None:
    responses = with_server(lambda running: bulk(running, *requests)).values()
    inner = {result.status.code for response in responses for result in response.response.results}
    assert {response.status.code for response in responses} | inner <= {code_pb2.OK, code_pb2.INVALID_ARGUMENT}

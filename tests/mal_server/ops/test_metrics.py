"""Metrics, log lines and reflection."""

import asyncio
import io
import json
import logging
import threading
import urllib.request
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from mal.v1 import labeling_pb2, model_pb2

from mal_server.config.server import default_config
from mal_server.ops.logging import JsonFormatter, TextFormatter
from mal_server.server import SERVICES
from mal_train.core.errors import DeviceError
from tests.mal_server.fakes import DISC_BOX, SHA256, BrightPredictor, Running, label, label_request, serving


def read(address: str) -> dict[str, float]:
    """Returns the metrics by name and labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def failed(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def metrics_after(work: Any, predictor: BrightPredictor | None = None, **settings: Any) -> dict[str, float]:
    async def run() -> dict[str, float]:
        async with serving(predictor, metrics={"port": 0}, **settings) as running:
            await asyncio.wait_for(work(running), 30)
            return await asyncio.to_thread(read, running.server.metrics_address)

    return asyncio.run(run())


def test_the_metrics_count_calls_batches_and_masks() -> None:
    async def work(running: Running) -> None:
        await label(running, label_request(DISC_BOX, (-5, 0, 30, 30)))
        await failed(label(running, label_request(DISC_BOX, content=b"no image")))
        await failed(label(running, label_request(DISC_BOX, threshold=7)))
        item = labeling_pb2.LabelImagesRequest(request=label_request(DISC_BOX, content=b"no image"))
        assert [response.status.code async for response in running.labeling.LabelImages(iter([item]))] == [3]

    metrics = metrics_after(work)
    method = "mal.v1.LabelingService/LabelImage"
    expected = {
        f'grpc_server_handled_total{{code="OK",method="{method}"}}': 1,
        f'grpc_server_handled_total{{code="INVALID_ARGUMENT",method="{method}"}}': 2,
        f'grpc_server_handling_seconds_count{{method="{method}"}}': 3,
        'mal_rejected_total{reason="IMAGE_FORMAT"}': 2,
        'mal_rejected_total{reason="BAD_REQUEST"}': 1,
        "mal_batch_crops_count": 1,
        "mal_batch_crops_sum": 2,
        "mal_queue_crops": 0,
        "mal_queue_bytes": 0,
        'mal_queue_seconds_count{priority="interactive"}': 1,
        'mal_stage_seconds_count{stage="decode"}': 1,
        'mal_stage_seconds_count{stage="infer"}': 1,
        'mal_stage_seconds_count{stage="finish"}': 1,
        'mal_masks_total{flag="NONE"}': 1,
        'mal_masks_total{flag="BOX_CLIPPED"}': 1,
        f'mal_model_info{{branch="student",name="disc",sha256="{SHA256}"}}': 1,
    }
    assert {name: metrics.get(name) for name in expected} == expected


def test_the_metrics_count_waiting_and_dropped_crops() -> None:
    gate = threading.Event()

    async def work(running: Running) -> None:
        calls = [asyncio.create_task(label(running, label_request(*[DISC_BOX] * 4))) for _ in range(2)]
        while not running.predictor.batches or running.server.waiting < 6:
            await asyncio.sleep(0.001)
        before = await asyncio.to_thread(read, running.server.metrics_address)
        assert before["mal_queue_crops"] == 6
        assert before["mal_queue_bytes"] > 6 * 3 * 16**2
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        while running.server.waiting:
            await asyncio.sleep(0.001)
        gate.set()
        await label(running, label_request(DISC_BOX))

    metrics = metrics_after(work, BrightPredictor(gate=gate), max_batch_size=2)
    assert metrics['mal_dropped_total{reason="cancelled_queue"}'] == 6
    assert metrics['mal_dropped_total{reason="cancelled_device"}'] == 2


def test_metrics_are_served_only_if_configured() -> None:
    async def work() -> str:
        async with serving() as running:
            return running.server.metrics_address

    assert asyncio.run(work()) == ""


def logged(form: logging.Formatter, work: Any, predictor: BrightPredictor | None = None, **settings: Any) -> list[str]:
    """Returns the log lines of a server."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(form)
    logger = logging.getLogger("mal_server")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel("INFO")

    async def run() -> None:
        async with serving(predictor, **settings) as running:
            await work(running)

    try:
        asyncio.run(run())
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return stream.getvalue().splitlines()


async def one_of_each(running: Running) -> None:
    call = running.model.GetServerInfo(model_pb2.GetServerInfoRequest(), metadata=(("x-request-id", "my-id-7"),))
    await call
    assert ("x-request-id", "my-id-7") in tuple(await call.trailing_metadata())
    error = await failed(label(running, label_request(DISC_BOX, content=b"no image")))
    trailers: Any = error.trailing_metadata()
    (request_id,) = [value for key, value in trailers if key == "x-request-id"]
    assert len(request_id) == 16


def test_every_call_is_one_line_of_json() -> None:
    first, second = (json.loads(line) for line in logged(JsonFormatter(), one_of_each))
    assert first["time"].endswith("Z")
    assert first | {"time": "", "took_ms": 0} == {
        "time": "",
        "level": "INFO",
        "logger": "mal_server.api.call_record",
        "message": "call",
        "method": "mal.v1.ModelService/GetServerInfo",
        "code": "OK",
        "took_ms": 0,
        "request_id": "my-id-7",
    }
    assert (second["code"], second["reason"]) == ("INVALID_ARGUMENT", "IMAGE_FORMAT")


def test_every_call_is_one_line_of_text() -> None:
    first, second = logged(TextFormatter(), one_of_each)
    assert " call method=mal.v1.ModelService/GetServerInfo code=OK took_ms=" in first
    assert first.endswith(" request_id=my-id-7")
    assert second.endswith(" reason=IMAGE_FORMAT")


@pytest.mark.parametrize("request_id", ["", "x" * 65, "two words", 'a"b'])
def test_a_request_id_that_could_break_the_log_format_is_replaced(request_id: str) -> None:
    async def work(running: Running) -> None:
        metadata = (("x-request-id", request_id),)
        await running.model.GetServerInfo(model_pb2.GetServerInfoRequest(), metadata=metadata)

    (line,) = logged(JsonFormatter(), work)
    assert len(json.loads(line)["request_id"]) == 16


def test_the_traceback_of_an_unexpected_error_is_part_of_its_line() -> None:
    async def work(running: Running) -> None:
        await label(running, label_request(DISC_BOX))

    lines = [json.loads(line) for line in logged(JsonFormatter(), work, BrightPredictor(error=DeviceError("on fire")))]
    (trace,) = [line["trace"] for line in lines if "trace" in line]
    assert "DeviceError: on fire" in trace


def listed(address: str) -> set[str]:
    """Lists the services, by gRPC's blocking channel: that of asyncio reports INTERNAL for some refused streams."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=30)
        return {service.name for response in call for service in response.list_services_response.service}


def test_reflection_lists_every_service() -> None:
    async def work() -> set[str]:
        async with serving() as running:
            return await asyncio.to_thread(listed, running.server.address)

    others = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert asyncio.run(work()) == {*SERVICES[1:], *others}


def test_reflection_can_be_disabled_and_requires_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAL_TEST_TOKEN", "0123456789abcdef")
    tokens = [{"name": "a", "token": "env:MAL_TEST_TOKEN", "scopes": ["label"]}]

    async def code(**settings: Any) -> grpc.StatusCode:
        async with serving(**settings) as running:
            with pytest.raises(grpc.RpcError) as raised:
                await asyncio.to_thread(listed, running.server.address)
            status: grpc.StatusCode = raised.value.code()
            return status

    assert asyncio.run(code(reflection=False)) is grpc.StatusCode.UNIMPLEMENTED
    assert asyncio.run(code(tokens=tokens)) is grpc.StatusCode.UNAUTHENTICATED


def test_the_default_settings_serve_no_metrics() -> None:
    assert "  port: null" in default_config()

"""Spans of calls, collected by an exporter in memory."""

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from mal.v1 import labeling_pb2_grpc, model_pb2, model_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mal_server.ops.tracing import Tracing
from mal_server.server import MalServer
from mal_train.core.errors import ConfigError
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, config_of, label_request, loaded
from tests.proxy import recording_proxy

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def spans_of(*boxes: tuple[float, float, float, float], **options: Any) -> list[ReadableSpan]:
    """Returns the spans of one LabelImage call under a client's span and one GetServerInfo call."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def work() -> None:
        server = MalServer(config_of(), lambda plan: loaded(plan, BrightPredictor(wait_s=0.02)), Tracing(provider))
        await server.start()
        await server.load()
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                parent = (("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01"),)
                labeling: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
                model: Any = model_pb2_grpc.ModelServiceStub(channel)
                call = labeling.LabelImage(label_request(*boxes, **options), metadata=parent)
                try:
                    async for _ in call:
                        pass
                except grpc.aio.AioRpcError:
                    assert "threshold" in options
                await model.GetServerInfo(model_pb2.GetServerInfoRequest())
        finally:
            await server.stop(0)

    asyncio.run(work())
    return list(exporter.get_finished_spans())


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_call_has_a_span_under_its_clients_and_each_stage_one_under_that() -> None:
    spans = {span.name: span for span in spans_of(DISC_BOX)}
    call = spans["/mal.v1.LabelingService/LabelImage"]
    context = call.get_span_context()
    assert context is not None
    assert f"{context.trace_id:032x}" == TRACE_ID
    for name in ("decode", "queue", "infer", "finish"):
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == context.span_id
    infer = spans["infer"]
    assert 0.02 <= seconds(infer) <= seconds(call)
    assert infer.attributes is not None
    assert infer.attributes["mal.batch_crops"] == 1
    assert "/mal.v1.ModelService/GetServerInfo" in spans


def test_a_call_with_resolved_overlaps_has_one_span_for_each_stage() -> None:
    names = [span.name for span in spans_of(DISC_BOX, DISC_BOX, resolve_overlaps=True)]
    assert [names.count(stage) for stage in ("decode", "queue", "infer", "finish")] == [1] * 4


def test_a_refused_call_has_a_span_with_its_status() -> None:
    spans = {span.name: span for span in spans_of(DISC_BOX, threshold=7.0)}
    attributes = spans["/mal.v1.LabelingService/LabelImage"].attributes
    assert attributes is not None
    assert attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "infer" not in spans


def test_tracing_without_its_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.grpc", None)
    with pytest.raises(ConfigError, match=r"mask-auto-labeler\[tracing\]"):
        MalServer(config_of(tracing=True))


def test_tracing_is_off_by_default() -> None:
    assert not config_of().tracing


def test_a_collector_on_this_machine_is_reached_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    received = threading.Event()

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            received.set()
            return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)  # type: ignore[no-untyped-call]
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    with recording_proxy() as proxy:
        for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        tracing = Tracing()
        tracing.add_stages(SimpleNamespace(decode_s=0.1, queue_s=0.0, infer_s=0.0, finish_s=0.0, batch_size=1))
        tracing.close()
        assert received.is_set()
        assert proxy.requests == []
    collector.stop(None)


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
@pytest.mark.parametrize("endpoint", ["http://collector.example:port", "http://[::1:4317", "collector.example:99999"])
def test_a_malformed_endpoint_is_refused_by_its_variable(
    variable: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, endpoint)
    with pytest.raises(ConfigError, match=variable):
        Tracing()


def test_headers_for_a_collector_do_not_pass_a_proxy_in_plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector.example:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=topsecret")
    with pytest.raises(ConfigError, match="https_proxy") as caught:
        Tracing()
    assert "topsecret" not in str(caught.value)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector.example:4317")
    Tracing().close()

"""Optional spans for OpenTelemetry: one a call, and in it one for each stage of its work. Off unless `tracing` is set.

The span of a call, and its parent from the caller's `traceparent`, are the business of OpenTelemetry's own gRPC
instrumentation; the stages are ours. Where spans go is said by OpenTelemetry's variables (OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_SERVICE_NAME, …).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import grpc

from mal_train.core.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

OURS: Final = "/mal.v1."
EXTRA: Final = "tracing: needs OpenTelemetry; pip install 'mask-auto-labeler[tracing]', or set tracing=false"


class Tracing:
    """Spans of one server.

    Args:
        provider: where spans go; None: a new one that exports by OTLP.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        try:
            from opentelemetry.instrumentation.grpc import aio_server_interceptor  # noqa: PLC0415 - only where asked for
        except ModuleNotFoundError as error:
            raise ConfigError(f"{EXTRA} ({error.name} is missing)") from None
        self._provider = _exporting() if provider is None else provider
        self._tracer = self._provider.get_tracer("mal_server")
        # Health and reflection calls come every few seconds and say nothing.
        self.interceptor: grpc.aio.ServerInterceptor[Any, Any] = aio_server_interceptor(  # type: ignore[no-untyped-call]
            tracer_provider=self._provider, filter_=lambda details: details.method.startswith(OURS)
        )

    def stages(self, timing: Any) -> None:
        """Adds a span for each stage of a part to the call that is running, ending now, one after the other.

        Args:
            timing: `pipeline.Timing`. Decoding is one stage of all parts of a request and stands in each of them.
        """
        lengths = {
            "decode": timing.decode_s,
            "queue": timing.queue_s,
            "infer": timing.infer_s,
            "finish": timing.finish_s,
        }
        begin_ns = time.time_ns() - round(sum(lengths.values()) * 1e9)
        for name, seconds in lengths.items():
            span = self._tracer.start_span(name, start_time=begin_ns)
            begin_ns += round(seconds * 1e9)
            if name == "infer":
                span.set_attribute("mal.batch_crops", timing.batch_size)
            span.end(begin_ns)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def _exporting() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - as above
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    # OTEL_SERVICE_NAME, where it is set, wins over ours.
    provider = TracerProvider(resource=Resource({"service.name": "mal-server"}).merge(Resource.create()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider

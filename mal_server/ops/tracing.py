"""Exports OpenTelemetry spans: one for each call, with one for each stage of its work. Off unless `tracing` is set.

OpenTelemetry's gRPC instrumentation creates the span of a call, under the client's `traceparent`; this module adds the
stages. OpenTelemetry's variables configure the export (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, …).
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import grpc

from mal_train.core.addresses import DEFAULT_PORT, format_address
from mal_train.core.errors import ConfigError
from mal_train.core.proxies import grpc_options, proxy_of_server, refuse_plaintext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

OURS: Final = "/mal.v1."
DEFAULT_ENDPOINT: Final = "http://localhost:4317"
"""Endpoint of OpenTelemetry's exporter where no variable names one."""

EXTRA: Final = (
    "tracing: OpenTelemetry is not installed; pip install 'mask-auto-labeler[tracing]', or set tracing: false"
)


class Tracing:
    """Creates and exports the spans of one server.

    Args:
        provider: receives spans; None: a new one that exports by OTLP.

    Attributes:
        interceptor: creates the span of each call.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        try:
            from opentelemetry.instrumentation.grpc import aio_server_interceptor  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise ConfigError(f"{EXTRA} ({error.name} is missing)") from None
        self._provider = _exporting() if provider is None else provider
        self._tracer = self._provider.get_tracer("mal_server")
        # Health and reflection calls are frequent and of no interest.
        self.interceptor: grpc.aio.ServerInterceptor[Any, Any] = aio_server_interceptor(  # type: ignore[no-untyped-call]
            tracer_provider=self._provider, filter_=lambda details: details.method.startswith(OURS)
        )

    def add_stages(self, timing: Any) -> None:
        """Adds consecutive spans for the stages of a partial result to the current call; the last one ends now.

        Args:
            timing: `pipeline.Timing`. All partial results of a request share its decode stage, and each repeats it.
        """
        durations_s = {
            "decode": timing.decode_s,
            "queue": timing.queue_s,
            "infer": timing.infer_s,
            "finish": timing.finish_s,
        }
        begin_ns = time.time_ns() - round(sum(durations_s.values()) * 1e9)
        for name, seconds in durations_s.items():
            span = self._tracer.start_span(name, start_time=begin_ns)
            begin_ns += round(seconds * 1e9)
            if name == "infer":
                span.set_attribute("mal.batch_crops", timing.batch_size)
            span.end(begin_ns)

    def close(self) -> None:
        """Exports the remaining spans."""
        self._provider.shutdown()


def _exporting() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - as above
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    # Its type knows options with texts only.
    exporter = OTLPSpanExporter(channel_options=_channel_options())  # type: ignore[arg-type]
    # The variable OTEL_SERVICE_NAME takes precedence.
    provider = TracerProvider(resource=Resource({"service.name": "mal-server"}).merge(Resource.create()))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _channel_options() -> tuple[tuple[str, Any], ...]:
    """Returns the options with which the exporter follows our rule for proxies.

    Raises:
        ConfigError: the endpoint is no address, or a proxy could read the headers of OTEL_EXPORTER_OTLP_HEADERS, which
            hold credentials.
    """
    endpoint = _of_signal("ENDPOINT") or DEFAULT_ENDPOINT
    try:
        parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
        address = format_address(parts.hostname or "", parts.port or DEFAULT_PORT)
    except ValueError:
        # The value is not shown: it may hold a password.
        raise ConfigError(
            f"{_variable('ENDPOINT')}: its host or port is malformed; give an address such as {DEFAULT_ENDPOINT}"
        ) from None
    is_plaintext = parts.scheme == "http" or (parts.scheme != "https" and _of_signal("INSECURE").lower() == "true")
    proxy = proxy_of_server(address)
    if proxy is not None and proxy.carries_grpc and is_plaintext and _of_signal("HEADERS"):
        refuse_plaintext(endpoint, "OTEL_EXPORTER_OTLP_ENDPOINT", "the headers of OTEL_EXPORTER_OTLP_HEADERS", proxy)
    return tuple(grpc_options(address))


def _of_signal(name: str) -> str:
    """Returns a variable of the exporter: that of traces, else that of all signals."""
    return os.environ.get(_variable(name), "")


def _variable(name: str) -> str:
    """Returns the name of the variable that counts: that of traces if it is set, else that of all signals."""
    of_traces = f"OTEL_EXPORTER_OTLP_TRACES_{name}"
    return of_traces if os.environ.get(of_traces) else f"OTEL_EXPORTER_OTLP_{name}"

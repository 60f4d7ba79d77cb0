"""Counts what the server does, in a Prometheus registry of its own, and shows it on a port of its own when asked to.

    grpc_server_handled_total{method,code}      calls that ended
    grpc_server_handling_seconds{method}        time from their start to their end
    mal_queue_crops                             crops that are admitted and not yet running
    mal_queue_bytes                             memory that they hold, as admitted
    mal_queue_seconds{priority}                 a request's longest wait for a batch
    mal_batch_crops                             crops in a device batch
    mal_stage_seconds{stage}                    decode: one request · infer: one batch · finish: one request's share
    mal_rejected_total{reason}                  calls and bulk items that were refused, by the reason in their status
    mal_dropped_total{reason}                   admitted crops that nobody waits for any more
    mal_masks_total{flag}                       masks by flag; NONE: masks without one
    mal_image_cache_hits_total, …_misses_total  requests that named a picture by its handle
    mal_image_cache_bytes                       memory of the pictures held
    mal_model_info{name,sha256,branch}          1 for each model that answers
    process_*                                   CPU, memory, files and start of this process

Always counted, which costs microseconds a request; knows nothing of gRPC's objects.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from mal_train.core.errors import ConfigError

TIMES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
NO_FLAG = "NONE"


class _HttpServer(Protocol):
    server_port: int

    def shutdown(self) -> None: ...
    def server_close(self) -> None: ...


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.on_part: Callable[[object], None] | None = None
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._handled = Counter("grpc_server_handled", "Calls that ended.", ["method", "code"], registry=registry)
        self._handling = Histogram(
            "grpc_server_handling_seconds", "Time of a call.", ["method"], buckets=TIMES_S, registry=registry
        )
        self._queue_crops = Gauge("mal_queue_crops", "Crops admitted and not yet running.", registry=registry)
        self._queue_bytes = Gauge("mal_queue_bytes", "Memory that they hold.", registry=registry)
        self._queue = Histogram(
            "mal_queue_seconds", "Wait for a batch.", ["priority"], buckets=TIMES_S, registry=registry
        )
        self._batch = Histogram("mal_batch_crops", "Crops in a device batch.", buckets=SIZES, registry=registry)
        self._stage = Histogram("mal_stage_seconds", "Time in a stage.", ["stage"], buckets=TIMES_S, registry=registry)
        self._rejected = Counter("mal_rejected", "Refused calls and items.", ["reason"], registry=registry)
        self._dropped = Counter("mal_dropped", "Admitted crops that nobody waits for.", ["reason"], registry=registry)
        self._masks = Counter("mal_masks", "Masks by flag.", ["flag"], registry=registry)
        self._cache_hits = Counter("mal_image_cache_hits", "Handles of pictures that were held.", registry=registry)
        self._cache_misses = Counter("mal_image_cache_misses", "Handles of pictures that were not.", registry=registry)
        self._cache_bytes = Gauge("mal_image_cache_bytes", "Memory of the pictures held.", registry=registry)
        self._model = Gauge(
            "mal_model_info", "1 for each model that answers.", ["name", "sha256", "branch"], registry=registry
        )

    def call_ended(self, method: str, code: str, took_s: float) -> None:
        """A call came to its end with a status code."""
        self._handled.labels(method, code).inc()
        self._handling.labels(method).observe(took_s)

    def rejected(self, reason: str) -> None:
        """A call or an item was answered with an error that has a reason."""
        self._rejected.labels(reason).inc()

    def batch_ended(self, size: int, took_s: float) -> None:
        """A device batch ran."""
        self._batch.observe(size)
        self._stage.labels("infer").observe(took_s)

    def waited(self, priority: str, seconds: float) -> None:
        """A request's crops left the queue."""
        self._queue.labels(priority).observe(seconds)

    def dropped(self, reason: str, crops: int) -> None:
        """Crops left the server without an answer."""
        self._dropped.labels(reason).inc(crops)

    def decoded(self, seconds: float) -> None:
        """A request's image was decoded and cut."""
        self._stage.labels("decode").observe(seconds)

    def finished(self, seconds: float) -> None:
        """A share of a request was turned into masks."""
        self._stage.labels("finish").observe(seconds)

    def part_done(self, timing: object) -> None:
        """Some of a request's answers are ready; `timing` is theirs. Counts nothing: tells whoever follows calls."""
        if self.on_part is not None:
            self.on_part(timing)

    def labeled(self, flags: Sequence[str]) -> None:
        """A mask was made."""
        for flag in flags or (NO_FLAG,):
            self._masks.labels(flag).inc()

    def looked_up(self, *, found: bool) -> None:
        """A request named a picture by its handle."""
        (self._cache_hits if found else self._cache_misses).inc()

    def watch_cache(self, size_bytes: Callable[[], float]) -> None:
        """Reads the cache's size whenever the figures are read."""
        self._cache_bytes.set_function(size_bytes)

    def watch_queue(self, crops: Callable[[], float], size_bytes: Callable[[], float]) -> None:
        """Reads the queue's state whenever the figures are read."""
        self._queue_crops.set_function(crops)
        self._queue_bytes.set_function(size_bytes)

    def serves(self, models: Iterable[tuple[str, str, str]]) -> None:
        """These models (name, SHA-256, branch) answer from now on."""
        self._model.clear()
        for labels in models:
            self._model.labels(*labels).set(1)


class MetricsPort:
    """Shows the figures on http://host:port/metrics, from a thread of its own.

    Raises:
        ConfigError: the address cannot be had.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        try:
            server, self._thread = start_http_server(port, host, metrics.registry)
        except OSError as error:
            raise ConfigError(f"metrics: cannot listen on {host}:{port}: {error.strerror}") from None
        self._server: _HttpServer = server
        self.port = self._server.server_port

    def close(self) -> None:
        """Stops showing them."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

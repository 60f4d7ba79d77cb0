"""Counts events of the server in its own Prometheus registry; `metrics_port` serves it.

    grpc_server_handled_total{method,code}      finished calls
    grpc_server_handling_seconds{method}        duration of a call
    mal_queue_crops                             admitted crops that do not run yet
    mal_queue_bytes                             memory of admitted requests
    mal_queue_seconds{priority}                 longest wait of a request for a batch
    mal_batch_crops                             crops in a device batch
    mal_stage_seconds{stage}                    decode: one request · infer: one batch · finish: one partial result
    mal_rejected_total{reason}                  failed calls and bulk items, by the reason in their status
    mal_dropped_total{reason}                   admitted crops whose call was cancelled or expired
    mal_masks_total{flag}                       masks by flag; NONE: masks without a flag
    mal_image_cache_hits_total, …_misses_total  requests with the SHA-256 of an image
    mal_image_cache_bytes                       memory of the cached images
    mal_model_info{name,sha256,branch}          1 for each served model
    process_*                                   CPU, memory, files and start time of this process

Counting costs microseconds for each request and is always on. Knows nothing of gRPC.
"""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

TIMES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
NO_FLAG = "NONE"


class Metrics:
    """Metrics of one server.

    Args:
        on_timing: also receives the `Timing` of each partial result, for tracing.
    """

    def __init__(self, on_timing: Callable[[object], None] | None = None) -> None:
        self._on_timing = on_timing
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._handled = Counter("grpc_server_handled", "Finished calls.", ["method", "code"], registry=registry)
        self._handling = Histogram(
            "grpc_server_handling_seconds", "Duration of a call.", ["method"], buckets=TIMES_S, registry=registry
        )
        self._queue_crops = Gauge("mal_queue_crops", "Admitted crops that do not run yet.", registry=registry)
        self._queue_bytes = Gauge("mal_queue_bytes", "Memory of admitted requests.", registry=registry)
        self._queue = Histogram(
            "mal_queue_seconds", "Wait for a batch.", ["priority"], buckets=TIMES_S, registry=registry
        )
        self._batch = Histogram("mal_batch_crops", "Crops in a device batch.", buckets=SIZES, registry=registry)
        self._stage = Histogram("mal_stage_seconds", "Time in a stage.", ["stage"], buckets=TIMES_S, registry=registry)
        self._rejected = Counter("mal_rejected", "Failed calls and items.", ["reason"], registry=registry)
        self._dropped = Counter(
            "mal_dropped", "Admitted crops whose call was cancelled or expired.", ["reason"], registry=registry
        )
        self._masks = Counter("mal_masks", "Masks by flag.", ["flag"], registry=registry)
        self._cache_hits = Counter(
            "mal_image_cache_hits", "Requests with the SHA-256 of a cached image.", registry=registry
        )
        self._cache_misses = Counter(
            "mal_image_cache_misses", "Requests with the SHA-256 of an image that is not cached.", registry=registry
        )
        self._cache_bytes = Gauge("mal_image_cache_bytes", "Memory of the cached images.", registry=registry)
        self._model = Gauge(
            "mal_model_info", "1 for each served model.", ["name", "sha256", "branch"], registry=registry
        )

    def call_ended(self, method: str, code: str, took_s: float) -> None:
        """Counts a finished call."""
        self._handled.labels(method, code).inc()
        self._handling.labels(method).observe(took_s)

    def rejected(self, reason: str) -> None:
        """Counts a call or an item that failed with a reason."""
        self._rejected.labels(reason).inc()

    def batch_ended(self, size: int, took_s: float) -> None:
        """Counts a device batch."""
        self._batch.observe(size)
        self._stage.labels("infer").observe(took_s)

    def waited(self, priority: str, seconds: float) -> None:
        """Records the longest wait of a request's crops in the queue."""
        self._queue.labels(priority).observe(seconds)

    def dropped(self, reason: str, count: int) -> None:
        """Counts crops that left the server without a result."""
        self._dropped.labels(reason).inc(count)

    def decoded(self, seconds: float) -> None:
        """Records the time to decode an image and crop its boxes."""
        self._stage.labels("decode").observe(seconds)

    def finished(self, seconds: float) -> None:
        """Records the time to turn a partial result into masks."""
        self._stage.labels("finish").observe(seconds)

    def part_done(self, timing: object) -> None:
        """Passes the `Timing` of a partial result on to `on_timing`; counts nothing."""
        if self._on_timing is not None:
            self._on_timing(timing)

    def labeled(self, flags: Sequence[str]) -> None:
        """Counts a mask."""
        for flag in flags or (NO_FLAG,):
            self._masks.labels(flag).inc()

    def cache_looked_up(self, *, hit: bool) -> None:
        """Counts a request with the SHA-256 of an image."""
        (self._cache_hits if hit else self._cache_misses).inc()

    def watch_cache(self, size_bytes: Callable[[], float]) -> None:
        """Sets the function that returns the size of the image cache."""
        self._cache_bytes.set_function(size_bytes)

    def watch_queue(self, crops: Callable[[], float], size_bytes: Callable[[], float]) -> None:
        """Sets the functions that return the number of waiting crops and their memory."""
        self._queue_crops.set_function(crops)
        self._queue_bytes.set_function(size_bytes)

    def set_models(self, models: Iterable[tuple[str, str, str]]) -> None:
        """Sets the served models, each (name, SHA-256, branch)."""
        self._model.clear()
        for labels in models:
            self._model.labels(*labels).set(1)

"""The server's life: bind, load, serve, drain, stop. Joins the parts; decides nothing about requests.

    start  binds the port; health says NOT_SERVING, calls are answered UNAVAILABLE
    load   reads the checkpoints, warms up and tests every worker; health says SERVING, for each model too
    drain  health says NOT_SERVING, calls are still answered
    stop   refuses new calls, lets running ones finish within the grace period

A device that is lost for good (`DeviceLost`) ends the server: health says NOT_SERVING at once, calls under way and new
ones are answered UNAVAILABLE, and `serve` raises, so that a supervisor starts a new process.

`serve` goes through all of it once, driven by signals.
"""

import asyncio
import gc
import logging
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from mal.v1 import evaluation_pb2, evaluation_pb2_grpc, labeling_pb2, labeling_pb2_grpc, model_pb2, model_pb2_grpc
from prometheus_client import CollectorRegistry

from mal_server.api.interceptors import CallInterceptor
from mal_server.api.service import EvaluationService, LabelingService, ModelService
from mal_server.config.server import ServerConfig
from mal_server.config.tokens import TokenSetting
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.inference.image_store import ImageCache, ImageStore
from mal_server.models.loader import ModelInfo, load_model
from mal_server.models.registry import Load, ModelRegistry
from mal_server.ops.metrics import Metrics, MetricsPort
from mal_server.ops.tracing import Tracing
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.security.auth import read_resume_key, read_tokens
from mal_server.security.tls import server_credentials
from mal_train.core.errors import ConfigError, DeviceLost, OutputError
from mal_train.core.net import is_loopback
from mal_train.core.version import distribution_version

log = logging.getLogger(__name__)

MAX_STREAMS = 1000
"""Calls at once on one connection; further ones wait at the client.

Not the usual 100: a client that cancels calls which wait there never gets another answer on that connection (seen with
grpcio 1.85), and an asyncio client may well have 200 calls under way. What waits is bounded by the queue anyway.
"""

LOST_GRACE_S = 5.0
"""After a device was lost: how long the answers of running calls may take to get out."""

SERVICES = (
    "",
    labeling_pb2.DESCRIPTOR.services_by_name["LabelingService"].full_name,
    evaluation_pb2.DESCRIPTOR.services_by_name["EvaluationService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)
"""Names that health answers for; the empty one is the whole server."""


def health_name(model: str) -> str:
    """The name under which health tells whether a model answers."""
    return f"{SERVICES[1]}/{model}"


class MalServer:
    """One server on one port, used from one event loop.

    Args:
        config: see `ServerConfig`.
        load: gives a model; runs in a thread.
        tracing: where spans go; None: as the settings say.

    Raises:
        ConfigError: a certificate, key or token that cannot be used, or tracing that is not installed.
    """

    def __init__(self, config: ServerConfig, load: Load = load_model, tracing: Tracing | None = None) -> None:
        self._config = config
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._pool = PriorityThreadPool(config.threads or os.cpu_count() or 1, batch_aging_s=config.batch_aging_s)
        self._metrics = Metrics()
        self._tracing = Tracing() if tracing is None and config.tracing else tracing
        if self._tracing is not None:
            self._metrics.on_part = self._tracing.stages
        self._resume_key = read_resume_key(config.resume_key)
        cache = ImageCache(config.image_cache_bytes)
        self._metrics.watch_cache(lambda: cache.size_bytes)
        folders = self._folders = AllowedDirs(
            {folder.name: folder.path for folder in config.data_folders}, "data_folders"
        )
        pictures = ImageStore(cache, folders, config.limits.images().max_bytes, self._metrics)
        self._models = ModelRegistry(
            config,
            load,
            pool=self._pool,
            pictures=pictures,
            metrics=self._metrics,
            on_lost=self._lose,
            on_change=self._model_changed,
        )
        self._metrics_port: MetricsPort | None = None
        self._tokens: Sequence[TokenSetting] = config.tokens
        self._access = read_tokens(config.tokens, is_private=is_loopback(config.listen.host))
        self._credentials = server_credentials(config.listen)
        self._server = self._build()
        self.lost = asyncio.Event()
        """Set once a device is lost; `error` then says why."""
        self.error: DeviceLost | None = None
        self.address = ""
        """host:port once started, with the real port where 0 was asked for."""
        self.metrics_address = ""
        """Likewise of the figures; empty when they are not shown."""

    async def start(self) -> None:
        """Binds the port and answers, NOT_SERVING so far.

        Raises:
            ConfigError: the address cannot be had.
        """
        host, port = self._config.listen.host, self._config.listen.port
        shown = f"[{host}]" if ":" in host else host
        for service in (*SERVICES, *(health_name(plan.name) for plan in self._config.plans)):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            if self._credentials is None:
                bound = self._server.add_insecure_port(f"{shown}:{port}")
            else:
                bound = self._server.add_secure_port(f"{shown}:{port}", self._credentials)
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise ConfigError(
                f"listen: cannot listen on {shown}:{port}; the port is in use or the address is not this machine's. "
                "Choose another listen.port (0 takes a free one)"
            )
        self.address = f"{shown}:{bound}"
        metrics = self._config.metrics
        if metrics.port is not None:
            self._metrics_port = MetricsPort(self._metrics, metrics.host, metrics.port)
            self.metrics_address = f"{metrics.host}:{self._metrics_port.port}"
        await self._server.start()

    async def load(self) -> list[ModelInfo]:
        """Loads and proves what the settings name, then says SERVING. Errors of `load_model` and `prove`."""
        await self._models.start()
        for service in SERVICES:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return self._models.infos()

    @property
    def waiting(self) -> int:
        """Crops that wait for a device."""
        return self._models.waiting

    @property
    def registry(self) -> CollectorRegistry:
        """The figures, for whoever reads them inside this process."""
        return self._metrics.registry

    async def reload_tokens(self, settings: Sequence[TokenSetting] | None = None) -> bool:
        """Reads the tokens anew, by other settings where they are given; whether anything changed.

        Raises:
            ConfigError: they cannot be used; those before stay.
        """
        wanted = self._tokens if settings is None else settings
        if self._access.names and not wanted:
            raise ConfigError(
                "tokens: none are left, which would let everybody in; restart the server if that is meant"
            )
        fresh = await asyncio.to_thread(read_tokens, wanted)
        self._tokens = wanted
        return self._access.adopt(fresh)

    async def drain(self) -> None:
        """Says NOT_SERVING, for good."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, waits at most `grace_s` seconds for running ones, cancels the rest, ends the threads."""
        await self._server.stop(grace_s)
        await self._models.close()
        self._pool.shutdown()
        if self._metrics_port is not None:
            await asyncio.to_thread(self._metrics_port.close)
            self._metrics_port = None
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def _lose(self, error: DeviceLost) -> None:
        if self.error is not None:
            return
        log.error("lost error=%s", error)
        self.error = error
        self._models.break_off(error)
        self.lost.set()
        await self._health.enter_graceful_shutdown()

    async def _model_changed(self, name: str, answers: bool) -> None:
        state = health_pb2.HealthCheckResponse.SERVING if answers else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        await self._health.set(health_name(name), state)

    def _build(self) -> grpc.aio.Server:
        limits = self._config.limits
        server = grpc.aio.server(
            # The span round everything, refusals included.
            interceptors=(
                *(() if self._tracing is None else (self._tracing.interceptor,)),
                CallInterceptor(self._access, self._metrics),
            ),
            options=(
                ("grpc.max_receive_message_length", limits.max_request_bytes),
                ("grpc.max_send_message_length", limits.max_response_bytes),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                # Without this a second server binds the same port in silence and takes half of the calls.
                ("grpc.so_reuseport", 0),
            ),
        )
        labeling_pb2_grpc.add_LabelingServiceServicer_to_server(
            LabelingService(self._models, limits, self._metrics), server
        )
        evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server(
            EvaluationService(self._models, self._config, self._folders, self._resume_key), server
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(self._models, self._config, distribution_version()), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.reflection:
            names = (*SERVICES[1:], health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server


async def serve(
    config: ServerConfig,
    *,
    port_file: Path | None = None,
    load: Load = load_model,
    reread: Callable[[], ServerConfig] | None = None,
    was_asked: Callable[[], bool] = lambda: False,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns.

    Args:
        config: see `ServerConfig`.
        port_file: receives "host:port" once the server is SERVING, and is removed at the end.
        load: gives a model.
        reread: gives the settings as they are now, for SIGHUP; None = only the tokens' files are read anew.
        was_asked: whether a SIGHUP came before this could hear it.

    Raises:
        DeviceLost: a device failed for good.
    """
    # What imports left behind lives as long as the process: walking through it takes the collector a tenth of a second
    # and more each time, in the event loop's thread, and again at the end.
    gc.freeze()
    gc.enable()
    stop, now, renew = _catch_signals()
    if was_asked():
        renew.set()
    server = MalServer(config, load)
    grace_s = 0.0
    is_started = False
    try:
        _remove(port_file)
        await server.start()
        is_started = True
        for plan in config.plans:
            log.info("address=%s model=%s loading=%s", server.address, plan.name, plan.checkpoint)
        loading = asyncio.ensure_future(server.load())
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            return
        infos = loading.result()
        _write(port_file, server.address)
        for info in infos:
            print(
                f"mal-server: serving {info.name} on {server.address} ({info.arch}, {info.branch}, "
                f"{', '.join(info.devices)}, {info.precision})",
                flush=True,
            )
        if server.metrics_address:
            log.info("metrics=http://%s/metrics", server.metrics_address)
        watching = asyncio.ensure_future(_watch_tokens(server, config, renew, reread))
        losing = asyncio.ensure_future(server.lost.wait())
        await asyncio.wait({stopping, losing}, return_when=asyncio.FIRST_COMPLETED)
        losing.cancel()
        watching.cancel()
        if server.error is not None:
            grace_s = LOST_GRACE_S
            stopping.cancel()
            raise server.error
        grace_s = config.grace_s
        log.info("draining drain_delay_s=%g grace_s=%g", config.drain_delay_s, config.grace_s)
        await server.drain()
        await _wait(now, config.drain_delay_s)
    finally:
        await server.stop(grace_s)
        _remove(port_file)
        if is_started:
            log.info("stopped")


def _catch_signals() -> tuple[asyncio.Event, asyncio.Event, asyncio.Event]:
    """Events that signals set, from before anything is loaded: left to itself a SIGHUP ends the process.

    Returns:
        stop: set by SIGTERM and SIGINT.
        now: set when nobody wants to wait for load balancers: SIGINT, or a second signal.
        renew: set by SIGHUP.
    """
    loop = asyncio.get_running_loop()
    stop, now, renew = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def on_signal(is_interrupt: bool) -> None:
        if is_interrupt or stop.is_set():
            now.set()
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, on_signal, False)
    loop.add_signal_handler(signal.SIGINT, on_signal, True)
    loop.add_signal_handler(signal.SIGHUP, renew.set)
    return stop, now, renew


async def _watch_tokens(
    server: MalServer, config: ServerConfig, asked: asyncio.Event, reread: Callable[[], ServerConfig] | None
) -> None:
    """Reads tokens anew when `asked` is set (SIGHUP) and every `token_reload_s`."""
    while True:
        await _wait(asked, config.token_reload_s or math.inf)
        is_asked = asked.is_set()
        asked.clear()
        try:
            settings = None
            if is_asked and reread is not None:
                now = await asyncio.to_thread(reread)
                settings = now.tokens
                others = [name for name in type(now).model_fields if getattr(now, name) != getattr(config, name)]
                if set(others) - {"tokens"}:
                    log.warning("settings changed that need a restart: %s", ", ".join(sorted({*others} - {"tokens"})))
            changed = await server.reload_tokens(settings)
        except ConfigError as error:
            log.error("tokens not reloaded, those before go on: %s", error)
            continue
        # This loop must live: without it a token that was withdrawn would count until a restart, and nobody would know.
        except Exception:
            log.exception("tokens not reloaded, those before go on; unexpected, and tried again the next time")
            continue
        if changed or is_asked:
            log.info("tokens reloaded changed=%s", changed)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), None if seconds == math.inf else seconds)
    except TimeoutError:
        return


def _write(path: Path | None, text: str) -> None:
    """Writes a small file that appears whole or not at all."""
    if path is None:
        return
    part = path.with_name(f".{path.name}.tmp")
    try:
        part.write_text(text + "\n", encoding="ascii")
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: the address cannot be written: {error.strerror}") from error


def _remove(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed: {error.strerror}") from error

"""Assembles the gRPC server from its parts. Decides nothing about requests.

    start  binds the port; health is NOT_SERVING, calls fail with UNAVAILABLE
    load   loads the checkpoints, warms up and verifies every worker; health is SERVING, also for each model
    drain  health is NOT_SERVING, calls are still served
    stop   refuses new calls, lets running ones finish within the grace period

The loss of a device (`DeviceLost`) ends the server: health is NOT_SERVING at once, and running and new calls fail with
UNAVAILABLE. `lifecycle.serve` then raises the error, so that a supervisor starts a new process.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from mal.v1 import evaluation_pb2, evaluation_pb2_grpc, labeling_pb2, labeling_pb2_grpc, model_pb2, model_pb2_grpc
from prometheus_client import CollectorRegistry

from mal_server.api.grpc_server import build_server, core_options, register
from mal_server.api.health import HealthService
from mal_server.api.interceptors import CallInterceptor
from mal_server.api.open_calls import OpenCalls
from mal_server.api.service import EvaluationService, LabelingService, ModelService
from mal_server.config.server import ServerConfig
from mal_server.config.tokens import TokenSetting
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.inference.image_store import ImageCache, ImageStore
from mal_server.models.loader import ModelInfo, load_model
from mal_server.models.registry import Load, ModelRegistry
from mal_server.ops.logging import fields
from mal_server.ops.metrics import Metrics
from mal_server.ops.metrics_port import MetricsPort
from mal_server.ops.tracing import Tracing
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.security.auth import read_resume_key, read_tokens
from mal_server.security.tls import server_credentials
from mal_train.core.addresses import format_address, is_loopback
from mal_train.core.errors import ConfigError, DeviceLost
from mal_train.core.version import distribution_version

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
"""Time for a running batch, the metrics port and the export of traces to end, each, after all calls have ended."""

LONG_S = 86400.0

LABELING = labeling_pb2.DESCRIPTOR.services_by_name["LabelingService"]
EVALUATION = evaluation_pb2.DESCRIPTOR.services_by_name["EvaluationService"]
MODEL = model_pb2.DESCRIPTOR.services_by_name["ModelService"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]

SERVICES = ("", LABELING.full_name, EVALUATION.full_name, MODEL.full_name)
"""Services with a health state; the empty name is the server as a whole."""


def health_name(model: str) -> str:
    """Returns the service name of a model's health state."""
    return f"{SERVICES[1]}/{model}"


class MalServer:
    """One server on one port, used from one event loop.

    Args:
        config: see `ServerConfig`.
        load: loads a model; runs in a thread.
        tracing: exports spans; None: according to the settings.

    Attributes:
        config: as given.
        address: host:port once started; the real port if the settings say 0.
        metrics_address: likewise of the metrics port; empty if metrics are not served.
        lost: set once a device is lost; `error` then holds the reason.

    Raises:
        ConfigError: an unusable certificate, key or token, or tracing is not installed.
    """

    def __init__(self, config: ServerConfig, load: Load = load_model, tracing: Tracing | None = None) -> None:
        self.config = config
        self._health = HealthService()
        self._pool = PriorityThreadPool(config.threads or os.cpu_count() or 1, batch_aging_s=config.batch_aging_s)
        self._tracing = Tracing() if tracing is None and config.tracing else tracing
        self._metrics = Metrics(None if self._tracing is None else self._tracing.add_stages)
        self._resume_key = read_resume_key(config.resume_key)
        cache = ImageCache(config.image_cache_bytes)
        self._metrics.watch_cache(lambda: cache.size_bytes)
        folders = self._folders = AllowedDirs(
            {folder.name: folder.path for folder in config.data_folders}, "data_folders"
        )
        images = ImageStore(cache, folders, config.limits.images().max_bytes, self._metrics)
        self._models = ModelRegistry(
            config,
            load,
            pool=self._pool,
            images=images,
            metrics=self._metrics,
            on_lost=self._on_lost,
            on_change=self._on_model_change,
        )
        self._metrics_port: MetricsPort | None = None
        self._tokens: Sequence[TokenSetting] = config.tokens
        self._authenticator = read_tokens(config.tokens, is_private=is_loopback(config.listen.host))
        self._calls = OpenCalls(config.connections)
        self._credentials = server_credentials(config.listen)
        self._server = self._build()
        self.lost = asyncio.Event()
        self.error: DeviceLost | None = None
        self.address = ""
        self.metrics_address = ""

    async def start(self) -> None:
        """Binds the port and serves health, NOT_SERVING so far.

        Raises:
            ConfigError: the address cannot be bound.
        """
        listen = self.config.listen
        address = format_address(listen.host, listen.port)
        for service in (*SERVICES, *(health_name(plan.name) for plan in self.config.plans)):
            self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            if self._credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, self._credentials)
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise ConfigError(
                f"listen: cannot listen on {address}; the port is in use, or this machine lacks the address; choose "
                "another listen.port (0 takes a free one)"
            )
        self.address = format_address(listen.host, bound)
        metrics = self.config.metrics
        if metrics.port is not None:
            self._metrics_port = MetricsPort(self._metrics.registry, metrics.host, metrics.port)
            self.metrics_address = format_address(metrics.host, self._metrics_port.port)
        await self._server.start()

    async def load(self) -> list[ModelInfo]:
        """Loads the configured models and sets health to SERVING. Raises the errors of `ModelRegistry.start`."""
        await self._models.start()
        for service in SERVICES:
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return self._models.infos()

    @property
    def waiting(self) -> int:
        """Crops that wait for a device."""
        return self._models.waiting

    @property
    def pending_changes(self) -> int:
        """Loads and unloads of models that run or wait."""
        return self._models.pending_changes

    @property
    def running_calls(self) -> int:
        """Calls of mal.v1 that run, streams included."""
        return len(self._calls)

    @property
    def registry(self) -> CollectorRegistry:
        """Registry of the metrics, for readers in this process."""
        return self._metrics.registry

    async def reload_tokens(self, settings: Sequence[TokenSetting] | None = None) -> bool:
        """Reads the tokens again, from new settings if given; returns whether they changed.

        Raises:
            ConfigError: a token is invalid, or none is left; the previous tokens stay in force.
        """
        settings = self._tokens if settings is None else settings
        if self._authenticator.names and not settings:
            raise ConfigError("tokens: none left, so every client would be served; restart the server to allow that")
        authenticator = await asyncio.to_thread(read_tokens, settings)
        self._tokens = settings
        changed = self._authenticator.replace(authenticator)
        if changed:
            self._calls.check_tokens(self._authenticator.check)
        return changed

    async def drain(self) -> None:
        """Sets health to NOT_SERVING for good."""
        self._health.drain()

    async def wait_ended(self) -> None:
        """Returns once gRPC has ended; raises the error that ended it on its own."""
        # With a timeout, because only then gRPC permits to cancel the wait.
        while await self._server.wait_for_termination(timeout=LONG_S):
            pass

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, cancels running ones after `grace_s` seconds and ends all threads but those that hang."""
        await self._server.stop(grace_s)
        await _for_a_while("running batches", self._models.close())
        self._pool.shutdown()
        if self._metrics_port is not None:
            await _for_a_while("the metrics port", asyncio.to_thread(self._metrics_port.close))
            self._metrics_port = None
        if self._tracing is not None:
            await _for_a_while("the export of traces", asyncio.to_thread(self._tracing.close))

    async def _on_lost(self, error: DeviceLost) -> None:
        if self.error is not None:
            return
        log.error("lost", extra=fields(error=error))
        self.error = error
        self._models.fail_all(error)
        self.lost.set()
        self._health.drain()

    async def _on_model_change(self, name: str, is_served: bool) -> None:
        if is_served:
            self._health.set(health_name(name), health_pb2.HealthCheckResponse.SERVING)
        else:
            self._health.forget(health_name(name))

    def _build(self) -> grpc.aio.Server:
        server = build_server(
            # Tracing first, so that the span of a call covers refusals too.
            (
                *(() if self._tracing is None else (self._tracing.interceptor,)),
                CallInterceptor(self._authenticator, self._calls, self.config, self._metrics),
            ),
            core_options(self.config),
        )
        register(
            labeling_pb2_grpc.add_LabelingServiceServicer_to_server,
            LabelingService(self._models, self.config, self._metrics),
            LABELING,
            server,
        )
        register(
            evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server,
            EvaluationService(self._models, self.config, self._folders, self._resume_key),
            EVALUATION,
            server,
        )
        register(
            model_pb2_grpc.add_ModelServiceServicer_to_server,
            ModelService(self._models, self.config, distribution_version()),
            MODEL,
            server,
        )
        register(health_pb2_grpc.add_HealthServicer_to_server, self._health, HEALTH, server)
        if self.config.reflection:
            names = (*SERVICES[1:], HEALTH.full_name, REFLECTION.full_name)
            add_reflection = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
            register(add_reflection, reflection.aio.ReflectionServicer(names), REFLECTION, server)  # type: ignore[attr-defined]
        return server


async def _for_a_while(name: str, ending: Awaitable[object]) -> None:
    """Waits for something to end, at most for CLOSE_TIMEOUT_S: a hanging device must not hold up the end."""
    try:
        await asyncio.wait_for(ending, CLOSE_TIMEOUT_S)
    except TimeoutError:
        log.warning("left behind at the end", extra=fields(running=name, after_s=CLOSE_TIMEOUT_S))

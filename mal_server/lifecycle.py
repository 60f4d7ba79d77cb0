"""Runs a server from startup to shutdown, driven by signals. Decides nothing about requests.

startup   binds the port, loads the models, writes the port file
run       serves until SIGTERM, SIGINT or the loss of a device, then drains; SIGHUP reloads tokens
shutdown  ends running calls within the grace period and removes the port file
"""

import asyncio
import gc
import logging
import math
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mal_server.config.server import ServerConfig
from mal_server.config.tokens import TokenSetting
from mal_server.models.loader import load_model
from mal_server.models.registry import Load
from mal_server.ops.descriptors import raise_descriptor_limit
from mal_server.ops.logging import fields
from mal_server.ops.watchdog import watch_loop
from mal_server.scheduling.background import LoopExecutor
from mal_server.server import MalServer
from mal_train.core.atomic_io import write_text
from mal_train.core.errors import ConfigError, OutputError

log = logging.getLogger(__name__)

LOST_GRACE_S = 5.0
"""Time for running calls to send their errors after a device was lost."""


async def serve(
    config: ServerConfig,
    *,
    port_file: Path | None = None,
    load: Load = load_model,
    reload_config: Callable[[], ServerConfig] | None = None,
    reload_at_start: Callable[[], bool] = lambda: False,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns.

    Args:
        config: see `ServerConfig`.
        port_file: receives "host:port" once the server is SERVING, and is removed at the end if it still has it.
        load: loads a model.
        reload_config: returns the current settings after SIGHUP; None: SIGHUP reloads only the token files.
        reload_at_start: returns True if SIGHUP arrived before this function installed its handler.

    Raises:
        DeviceLost: a device failed for good.
    """
    # Objects created by imports live until exit. Freezing them spares the garbage collector a pass over them, which
    # takes 0.1 s and more each time, in the event loop's thread.
    gc.freeze()
    gc.enable()
    asyncio.get_running_loop().set_default_executor(LoopExecutor())
    raise_descriptor_limit(config.connections.max_connections)
    signals = Signals()
    if reload_at_start():
        signals.reload.set()
    run = ServerRun(config, signals, port_file=port_file, load=load, reload_config=reload_config)
    watching = asyncio.ensure_future(watch_loop(config.watchdog_s))
    try:
        if await run.startup():
            await run.run()
    finally:
        await run.shutdown()
        watching.cancel()


class Signals:
    """Events that signals set in the running event loop, from before anything is loaded.

    Attributes:
        stop: SIGTERM or SIGINT.
        skip_delay: SIGINT, or a second signal: do not wait for load balancers.
        reload: SIGHUP, whose default action would end the process.
    """

    def __init__(self) -> None:
        self.stop, self.skip_delay, self.reload = asyncio.Event(), asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_stop, False)
        loop.add_signal_handler(signal.SIGINT, self._on_stop, True)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)

    def _on_stop(self, is_interrupt: bool) -> None:
        if is_interrupt or self.stop.is_set():
            self.skip_delay.set()
        self.stop.set()


class ServerRun:
    """One run of a server. Arguments as of `serve`."""

    def __init__(
        self,
        config: ServerConfig,
        signals: Signals,
        *,
        port_file: Path | None,
        load: Load,
        reload_config: Callable[[], ServerConfig] | None,
    ) -> None:
        self._config = config
        self._signals = signals
        self._port_file = port_file
        self._server = MalServer(config, load)
        self._reloader = TokenReloader(self._server, config, signals.reload, reload_config)
        self._grace_s = 0.0
        self._is_started = False

    async def startup(self) -> bool:
        """Starts the server and loads its models; returns False if a signal stopped it first."""
        _remove(self._port_file)
        await self._server.start()
        self._is_started = True
        for plan in self._config.plans:
            log.info("loading", extra=fields(address=self._server.address, model=plan.name, checkpoint=plan.checkpoint))
        loading = asyncio.ensure_future(self._server.load())
        await _first_of(loading, self._signals.stop.wait())
        if not loading.done():
            return False
        infos = loading.result()
        if self._port_file is not None:
            write_text(self._port_file, self._server.address + "\n")
        for info in infos:
            print(
                f"mal-server: serving {info.name} on {self._server.address} ({info.arch}, {info.branch}, "
                f"{', '.join(info.devices)}, {info.precision}, {info.network_engine})",
                flush=True,
            )
        if self._server.metrics_address:
            log.info("metrics=http://%s/metrics", self._server.metrics_address)
        return True

    async def run(self) -> None:
        """Serves until a stop signal, then drains.

        Raises DeviceLost at once when a device is lost, and any other error that ends gRPC.
        """
        reloading = asyncio.ensure_future(self._reloader.run())
        ended = asyncio.ensure_future(self._server.wait_ended())
        try:
            await _first_of(self._signals.stop.wait(), self._server.lost.wait(), ended)
        finally:
            reloading.cancel()
        if ended.done() and not ended.cancelled():
            ended.result()
        if self._server.error is not None:
            self._grace_s = LOST_GRACE_S
            raise self._server.error
        self._grace_s = self._config.grace_s
        log.info("draining drain_delay_s=%g grace_s=%g", self._config.drain_delay_s, self._config.grace_s)
        await self._server.drain()
        await _wait(self._signals.skip_delay, self._config.drain_delay_s)

    async def shutdown(self) -> None:
        """Ends running calls and all threads; removes the port file, unless it names another server by now."""
        await self._server.stop(self._grace_s)
        if self._port_file is not None and _holds(self._port_file, self._server.address + "\n"):
            _remove(self._port_file)
        if self._is_started:
            log.info("stopped")


class TokenReloader:
    """Reloads the tokens of a server on request and every `token_reload_s` seconds.

    Args:
        server: whose tokens to replace.
        config: the settings that the server started with.
        requested: set to request a reload, by SIGHUP.
        reload_config: returns the current settings; None: a request reloads only the token files.
    """

    def __init__(
        self,
        server: MalServer,
        config: ServerConfig,
        requested: asyncio.Event,
        reload_config: Callable[[], ServerConfig] | None,
    ) -> None:
        self._server = server
        self._config = config
        self._requested = requested
        self._reload_config = reload_config

    async def run(self) -> None:
        """Reloads until cancelled."""
        while True:
            await _wait(self._requested, self._config.token_reload_s or math.inf)
            is_requested = self._requested.is_set()
            self._requested.clear()
            try:
                await self._reload(is_requested)
            except ConfigError as error:
                log.error("tokens not reloaded, the previous ones stay in force: %s", error)
            # The loop must go on: otherwise a revoked token would stay valid until a restart, unnoticed.
            except Exception:
                log.exception("tokens not reloaded, the previous ones stay in force; unexpected error")

    async def _reload(self, is_requested: bool) -> None:
        settings = await self._current_settings() if is_requested else None
        changed = await self._server.reload_tokens(settings)
        if changed or is_requested:
            log.info("tokens reloaded changed=%s", changed)

    async def _current_settings(self) -> tuple[TokenSetting, ...] | None:
        if self._reload_config is None:
            return None
        current = await asyncio.to_thread(self._reload_config)
        names = sorted(set(type(current).model_fields) - {"tokens"})
        changed = [name for name in names if getattr(current, name) != getattr(self._config, name)]
        if changed:
            log.warning("settings changed that need a restart: %s", ", ".join(changed))
        return current.tokens


async def _first_of(*awaitables: Awaitable[Any]) -> None:
    """Waits until one of them is done and cancels the others. Raises nothing of theirs."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Waits for an event, at most for some seconds; math.inf: without limit."""
    try:
        await asyncio.wait_for(event.wait(), None if seconds == math.inf else seconds)
    except TimeoutError:
        return


def _holds(path: Path, text: str) -> bool:
    """Returns True if a file can be read and has this text."""
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeDecodeError):
        return False


def _remove(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed: {error.strerror}") from error

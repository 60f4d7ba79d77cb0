"""Binds and runs a local web application until a signal or an event stops it.

Knows nothing of the application. Needs aiohttp, which the extras `playground` and `labelstudio` install.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import islice
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from mal_train.core.addresses import format_address
from mal_train.core.errors import ConfigError

SHUTDOWN_S: Final = 2.0
"""Seconds that running requests get to finish after a shutdown was requested."""


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

RECEIVE_TIMEOUT_S: Final = 60.0
"""Time limit for the body of a request, so that a slow or lost sender does not occupy memory forever."""

MAX_CONNECTIONS: Final = 128
"""Open connections; more end the oldest ones, so that callers who only wait can keep nobody else out."""


class _OneLineRefusals(logging.Filter):
    """Logs a request that is not HTTP, as anybody may send it, in one line without the traceback of its parser."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.msg, record.args, record.exc_info = f"{record.getMessage()}: not a valid HTTP request", (), None
        return True


_log = logging.getLogger("mal_client.web_server")
_log.addFilter(_OneLineRefusals())


@asynccontextmanager
async def bound(
    app: web.Application, host: str, port: int, *, cancel_on_disconnect: bool = False
) -> AsyncIterator[str]:
    """Serves an application inside the block; yields its URL, such as http://127.0.0.1:8765.

    Args:
        app: the application; the block owns it and cleans it up at its end.
        host: address to listen on.
        port: port to listen on; 0 lets the system choose.
        cancel_on_disconnect: cancel the handler of a request when its client disconnects.

    Raises:
        ConfigError: the address cannot be bound.
    """
    connections = _Connections()
    app.middlewares.insert(0, connections.note)
    runner = web.AppRunner(
        app,
        handler_cancellation=cancel_on_disconnect,
        access_log=None,
        shutdown_timeout=SHUTDOWN_S,
        # Bodies stay as they were sent: their limits count these bytes, and no page compresses what it sends.
        auto_decompress=False,
        logger=_log,
    )
    await runner.setup()
    listening: asyncio.Server | None = None
    try:
        try:
            accept = connections.factory(runner.server)
            listening = await asyncio.get_running_loop().create_server(accept, host, port)
        # OverflowError: a port above 65535.
        except (OSError, OverflowError) as error:
            cause = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--host {host} --port {port}: cannot listen ({cause}); give another port, or --port 0 for a free one"
            ) from None
        yield f"http://{format_address(host, listening.sockets[0].getsockname()[1])}"
    finally:
        if listening is not None:
            listening.close()
        await runner.cleanup()


class _Connections:
    """Ends the oldest connections beyond MAX_CONNECTIONS that run no request.

    aiohttp limits neither their number nor the time until the first request is complete.
    """

    def __init__(self) -> None:
        self._running: set[object] = set()

    @property
    def note(self) -> Any:
        """Middleware that notes which connections run a request."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._running.add(request.protocol)
            try:
                return await handler(request)
            finally:
                self._running.discard(request.protocol)

        return middleware

    def factory(self, server: web.Server | None) -> Callable[[], asyncio.Protocol]:
        """Returns the factory of the connections of a server."""
        assert server is not None

        def accept() -> asyncio.Protocol:
            connections = server.connections
            idle = (connection for connection in connections if connection not in self._running)
            for connection in islice(idle, max(0, len(connections) + 1 - MAX_CONNECTIONS)):
                connection.force_close()
            return server()

        return accept


@asynccontextmanager
async def receiving() -> AsyncIterator[None]:
    """A context in which the body of a request is read.

    Raises:
        HTTPRequestTimeout: it takes more than RECEIVE_TIMEOUT_S.
        HTTPBadRequest: it is not sent as HTTP requires; for example, the length of a chunk is no number.
    """
    try:
        async with asyncio.timeout(RECEIVE_TIMEOUT_S):
            yield
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
    except web.RequestPayloadError:
        raise web.HTTPBadRequest from None


async def until_interrupted() -> None:
    """Waits for SIGINT or SIGTERM, and replaces their default actions from then on."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Windows loops have no signal handlers; Ctrl+C raises KeyboardInterrupt there.
        with suppress(NotImplementedError):
            loop.add_signal_handler(number, interrupted.set)
    await interrupted.wait()

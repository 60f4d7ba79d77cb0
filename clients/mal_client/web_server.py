"""Binds and runs a local web application until a signal or an event stops it.

Knows nothing of the application. Needs aiohttp, which the extras `playground` and `labelstudio` install.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from mal_train.core.addresses import format_address
from mal_train.core.errors import ConfigError

SHUTDOWN_S: Final = 2.0
"""Seconds that running requests get to finish after a shutdown was requested."""


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
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        # OverflowError: a port above 65535.
        except (OSError, OverflowError) as error:
            cause = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--host {host} --port {port}: cannot listen ({cause}); give another port, or --port 0 for a free one"
            ) from None
        yield f"http://{format_address(host, runner.addresses[0][1])}"
    finally:
        await runner.cleanup()


async def until_interrupted() -> None:
    """Waits for SIGINT or SIGTERM, and replaces their default actions from then on."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Windows loops have no signal handlers; Ctrl+C raises KeyboardInterrupt there.
        with suppress(NotImplementedError):
            loop.add_signal_handler(number, interrupted.set)
    await interrupted.wait()

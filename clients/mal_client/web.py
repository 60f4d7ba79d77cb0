"""The life of a web application of this machine: bind, say where, serve until a signal or an event ends it.

Knows nothing of what is served. Needs aiohttp, which the extras `playground` and `labelstudio` bring.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from mal_train.core.errors import ConfigError
from mal_train.core.net import format_address

SHUTDOWN_S: Final = 2.0
"""How long calls under way may take after the end was asked for."""


@asynccontextmanager
async def bound(app: web.Application, host: str, port: int, *, cancel_gone: bool = False) -> AsyncIterator[str]:
    """Serves an application inside the block; gives its address, such as http://127.0.0.1:8765.

    Args:
        app: it belongs to this block and is cleaned up at its end.
        host: address to listen on.
        port: 0 lets the system choose.
        cancel_gone: cancel the handler of a caller who has gone away.

    Raises:
        ConfigError: nobody can listen there.
    """
    runner = web.AppRunner(app, handler_cancellation=cancel_gone, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        # OverflowError: a port beyond 65535.
        except (OSError, OverflowError) as error:
            said = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--host {host} --port {port}: cannot listen there ({said}); give another port, or --port 0 for any"
            ) from None
        yield f"http://{format_address(host, runner.addresses[0][1])}"
    finally:
        await runner.cleanup()


async def until_interrupted() -> None:
    """Waits for SIGINT or SIGTERM, which from then on do nothing else."""
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, over.set)
    await over.wait()

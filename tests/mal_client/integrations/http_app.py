"""Runs a web application on a free port, in a background thread."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web


@contextmanager
def running(app: "web.Application") -> Iterator[str]:
    """Serves an application inside the block; yields its URL."""
    # Imported here, so that doctests of this file can be collected without aiohttp.
    from mal_client.web_server import bound

    started: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        stop = asyncio.Event()
        async with bound(app, "127.0.0.1", 0) as address:
            started.set_result((address, asyncio.get_running_loop(), stop))
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except Exception as error:
            # Passed to the thread of the test, which raises it.
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        address, loop, stop = started.result()
        try:
            yield address
        finally:
            loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join()

"""Runs a web application on a free port, in a thread of the test."""

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
    """Serves an application; gives its address."""
    # Here, so that an environment without the extra may look for doctests in this file.
    from mal_client.web import bound

    started: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def live() -> None:
        over = asyncio.Event()
        async with bound(app, "127.0.0.1", 0) as address:
            started.set_result((address, asyncio.get_running_loop(), over))
            await over.wait()

    def run() -> None:
        try:
            asyncio.run(live())
        except Exception as fault:
            # Whatever it is, the test's thread raises it.
            if started.done():
                raise
            started.set_exception(fault)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        address, loop, over = started.result()
        try:
            yield address
        finally:
            loop.call_soon_threadsafe(over.set)
    finally:
        thread.join()

"""Threads that the end of the server does not wait for: loading a checkpoint takes long and cannot be stopped.

A process that ends while such a thread runs must leave by `exit_process`: the interpreter would wait for a device's
thread, and be torn down around one that is in the middle of torch's C++ code.
"""

import asyncio
import contextvars
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

log = logging.getLogger(__name__)

Result = TypeVar("Result")

NAME = "mal-load"
DEVICE = "device-"
"""How the names of devices' threads begin (`Worker`)."""

PATIENCE_S = 2.0
"""For threads that are about to end by themselves."""


async def run_in_daemon_thread(work: Callable[[], Result]) -> Result:
    """As `asyncio.to_thread`, in a thread of its own that neither the event loop nor the interpreter waits for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():  # its caller was cancelled
            set_outcome(outcome)

    def run() -> None:
        try:
            told = partial(settle, future.set_result, work())
        # Whatever it is, it belongs to the caller.
        except BaseException as error:
            told = partial(settle, future.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(told)

    threading.Thread(target=partial(contextvars.copy_context().run, run), name=NAME, daemon=True).start()
    return await future


def exit_process(exit_code: int) -> int:
    """The exit code; where threads are still at work, ends the process with it at once, with its output written."""
    until = time.monotonic() + PATIENCE_S
    ours = [one for one in threading.enumerate() if one.name == NAME or one.name.startswith(DEVICE)]
    for thread in ours:
        thread.join(max(until - time.monotonic(), 0.0))
    if any(thread.is_alive() for thread in ours):
        log.warning("left while a checkpoint was being loaded")
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code

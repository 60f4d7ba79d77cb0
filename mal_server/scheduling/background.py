"""Work in threads, which goes on when its caller has gone: what it holds is given back once it has ended."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_in_thread(work: Callable[..., Result], *args: Any) -> "Future[Result]":
    """Runs `work(*args)` as `asyncio.to_thread` does, and tells when it has really ended.

    A future that is cancelled before its thread has begun is skipped; after that it cannot be cancelled.
    """
    step: Future[Result] = Future()
    call = partial(contextvars.copy_context().run, work, *args)
    asyncio.get_running_loop().run_in_executor(None, _settle, step, call)
    return step


def when_done(step: "Future[Any] | None", act: Callable[[], None]) -> None:
    """Acts in this loop when the step has ended; at once where there is none."""
    if step is None or step.done():
        act()
        return
    loop = asyncio.get_running_loop()

    def later(_: "Future[Any]") -> None:
        with suppress(RuntimeError):  # the loop, and all that it counted, is gone
            loop.call_soon_threadsafe(act)

    step.add_done_callback(later)


def _settle(step: "Future[Result]", call: Callable[[], Result]) -> None:
    if not step.set_running_or_notify_cancel():
        return
    try:
        step.set_result(call())
    # As any executor: what the work raises belongs to whoever waits for it.
    except BaseException as error:
        step.set_exception(error)

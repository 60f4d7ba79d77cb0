"""Work in threads that outlives its caller: resources it uses are released only once it has ended.

    run_in_thread         a thread of the loop's pool; `when_done` releases what the work used
    run_in_daemon_thread  a thread that shutdown does not wait for: loading a checkpoint takes minutes

A process with threads that may be in the middle of long work ends by `exit_process`. The interpreter would wait for
those of an executor, and crash if it finalized while a daemon runs C++ code of torch. `LoopExecutor` is the loop's pool
in such a process, since `asyncio.run` would wait for the usual one.
"""

import asyncio
import contextvars
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

Result = TypeVar("Result")

DAEMON_THREAD = "mal-load"
"""Name of every thread of `run_in_daemon_thread`."""

DEVICE_THREAD_PREFIX = "device-"
CPU_THREAD_PREFIX = "cpu-"

JOIN_TIMEOUT_S = 2.0
"""Time that `exit_process` gives threads to end by themselves."""


class LoopExecutor(ThreadPoolExecutor):
    """Default executor of an event loop that ends without waiting for running work.

    Work whose future is cancelled before a thread is free is dropped at once, with all that it refers to.
    """

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> "Future[Result]":
        """Schedules `fn(*args, **kwargs)`."""
        call = _Call(partial(fn, *args, **kwargs))
        future = super().submit(call)
        future.add_done_callback(call.drop)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Cancels the waiting work; each thread ends after its running work. Never waits, whatever `wait` says."""
        super().shutdown(wait=False, cancel_futures=True)


class _Call(Generic[Result]):
    """Work that can be dropped while an executor's queue still refers to the call."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work: Callable[[], Result] | None = work

    def __call__(self) -> Result:
        work, self._work = self._work, None
        assert work is not None, "called twice, or after it was dropped"
        return work()

    def drop(self, _: "Future[Any]") -> None:
        self._work = None


def run_in_thread(work: Callable[..., Result], *args: Any) -> "Future[Result]":
    """Runs `work(*args)` as `asyncio.to_thread` does; the future is done only when the thread has left the work.

    A future that is cancelled before its thread has begun is skipped; after that it cannot be cancelled.
    """
    future: Future[Result] = Future()
    call = _Call(_in_this_context(work, *args))
    future.add_done_callback(call.drop)
    asyncio.get_running_loop().run_in_executor(None, _settle, future, call)
    return future


def when_done(future: "Future[Any] | None", callback: Callable[[], None]) -> None:
    """Calls `callback` in this event loop when the future is done; at once if there is none."""
    when_all_done([] if future is None else [future], callback)


def when_all_done(futures: "Iterable[Future[Any]]", callback: Callable[[], None]) -> None:
    """Calls `callback` once in this event loop when all futures are done; at once if they are."""
    running = {future for future in futures if not future.done()}
    if not running:
        callback()
        return
    loop = asyncio.get_running_loop()

    def settle(future: "Future[Any]") -> None:
        running.discard(future)
        if not running:
            callback()

    for future in tuple(running):
        future.add_done_callback(lambda done: _call_in(loop, partial(settle, done)))


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pauses Python's garbage collector for work with millions of objects and no cycles among them.

    A collection stops all threads, for about a third of a second for each million of objects. Cycles of other threads
    wait until the last such work has ended.
    """
    with _pauses.lock:
        _pauses.count += 1
        gc.disable()
    try:
        yield
    finally:
        with _pauses.lock:
            _pauses.count -= 1
            if not _pauses.count:
                gc.enable()


class _Pauses:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0


_pauses = _Pauses()


async def run_in_daemon_thread(work: Callable[[], Result]) -> Result:
    """Runs `work()` in a thread of its own that neither the event loop nor the interpreter waits for."""
    future: Future[Result] = Future()
    threading.Thread(target=_settle, args=(future, _in_this_context(work)), name=DAEMON_THREAD, daemon=True).start()
    return await asyncio.wrap_future(future)


def exit_process(exit_code: int) -> int:
    """Returns the exit code if no thread is left that works; otherwise ends the process with it, output flushed."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    threads = [thread for thread in threading.enumerate() if _is_worker(thread)]
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    running = [thread.name for thread in threads if thread.is_alive()]
    if running:
        log.warning("exiting with threads still running: %s", ", ".join(running))
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def _is_worker(thread: threading.Thread) -> bool:
    """Returns True for a thread that the interpreter would wait for, and for the daemons that run our own work."""
    is_ours = thread.name == DAEMON_THREAD or thread.name.startswith(CPU_THREAD_PREFIX)
    return thread is not threading.current_thread() and (is_ours or not thread.daemon)


def _in_this_context(work: Callable[..., Result], *args: Any) -> Callable[[], Result]:
    return partial(contextvars.copy_context().run, work, *args)


def _settle(future: "Future[Result]", work: Callable[[], Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    # As in any executor: what the work raises belongs to the caller that awaits it.
    except BaseException as error:
        future.set_exception(error)


def _call_in(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed, and its counters with it
        loop.call_soon_threadsafe(callback)

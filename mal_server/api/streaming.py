"""Maps a stream of requests to a stream of responses, a bounded number at a time. Knows nothing of gRPC."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from mal_server.errors import StreamIdle

Request = TypeVar("Request")
Response = TypeVar("Response")


async def bounded_map(
    requests: AsyncIterator[Request],
    handle: Callable[[Request], AbstractAsyncContextManager[Response]],
    max_in_flight: int,
    *,
    idle_s: float,
    in_order: bool = False,
) -> AsyncGenerator[Response, None]:
    """Handles up to `max_in_flight` requests concurrently and reads no further ahead.

    Yields responses as they complete, or in the order of the requests. The context of a response ends when the next one
    is asked for, so that what it holds is held until then, also by responses that nobody reads. The first exception of
    `requests` or `handle` ends the stream. Closing the generator cancels the requests in flight.

    Raises:
        StreamIdle: no request arrived for `idle_s` seconds while none was in flight.
    """
    reading: asyncio.Task[Request | None] | None = None
    running: deque[asyncio.Task[tuple[Response, AsyncExitStack]]] = deque()
    is_exhausted = False
    try:
        while running or not is_exhausted:
            if not is_exhausted and reading is None and len(running) < max_in_flight:
                reading = asyncio.create_task(_next(requests))
            awaited = {running[0]} if in_order and running else set(running)
            pending = awaited | ({reading} if reading else set())
            done, _ = await asyncio.wait(
                pending, return_when=asyncio.FIRST_COMPLETED, timeout=None if running else idle_s
            )
            if not done:
                raise _idle_error(idle_s)
            if reading is not None and reading.done():
                request, reading = reading.result(), None
                if request is None:
                    is_exhausted = True
                else:
                    running.append(asyncio.create_task(_entered(handle(request))))
            for task in awaited:
                if task.done():
                    running.remove(task)
                    response, context = task.result()
                    async with context:
                        yield response
    finally:
        unfinished: list[asyncio.Task[Any]] = [*running, *([reading] if reading else [])]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        for task in running:
            if not task.cancelled() and task.exception() is None:
                await task.result()[1].aclose()


def contextless(
    handle: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], AbstractAsyncContextManager[Response]]:
    """Returns a handler for `bounded_map` whose responses hold nothing."""

    @asynccontextmanager
    async def handled(request: Request) -> AsyncIterator[Response]:
        yield await handle(request)

    return handled


async def each_within(requests: AsyncIterator[Request], idle_s: float) -> AsyncGenerator[Request, None]:
    """Yields the requests of a stream that is read alone. Raises StreamIdle if one takes longer than `idle_s`."""
    while True:
        try:
            async with asyncio.timeout(idle_s):
                request = await _next(requests)
        except TimeoutError:
            raise _idle_error(idle_s) from None
        if request is None:
            return
        yield request


async def each(items: Iterable[Request]) -> AsyncGenerator[Request, None]:
    """Yields the items as an asynchronous stream."""
    for item in items:
        yield item


async def _next(requests: AsyncIterator[Request]) -> Request | None:
    return await anext(requests, None)


def _idle_error(idle_s: float) -> StreamIdle:
    return StreamIdle(f"no request for {idle_s:g} s; open another stream for further ones")


async def _entered(handled: AbstractAsyncContextManager[Response]) -> tuple[Response, AsyncExitStack]:
    """Returns a response, and the stack that ends its context."""
    async with AsyncExitStack() as stack:
        response = await stack.enter_async_context(handled)
        return response, stack.pop_all()

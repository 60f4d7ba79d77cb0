"""Keeps the running calls of a server: limits their number, and ends those whose token is no longer valid."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from mal_server.config.connections import Connections
from mal_server.errors import PermissionDenied, StreamIdle, TooManyCalls, TooManyStreams, Unauthenticated
from mal_server.security.auth import TokenScopes


class CallScope:
    """A context in which a running call can be ended with an error, by raising it where the call waits.

    Args:
        method: "/package.Service/Method".
        token: that the call carries; None if it needs none.
        is_stream: its client sends several requests.
        write_timeout_s: time for the client to read a response.
    """

    def __init__(self, method: str, token: TokenScopes | None, *, is_stream: bool, write_timeout_s: float) -> None:
        self.method = method
        self.token = token
        self.is_stream = is_stream
        self._write_timeout_s = write_timeout_s
        self._timeout = asyncio.timeout(None)
        self._error: Exception | None = None
        self._is_writing = False

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(error_type, error, traceback)
        except TimeoutError:
            if self._error is None:
                raise
            raise self._error from None

    def end(self, error: Exception) -> None:
        """Ends the call with an error; a response that is being sent is completed first."""
        if self._error is None:
            self._error = error
            if not self._is_writing:
                self._interrupt()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A context in which a response is sent.

        If the client does not read it, the call is cancelled: until then it cannot receive a status either.
        """
        self._is_writing = True
        stalled = asyncio.get_running_loop().call_later(self._write_timeout_s, self._on_stalled)
        try:
            yield
        finally:
            stalled.cancel()
            self._is_writing = False
        if self._error is not None:
            raise self._error

    def _on_stalled(self) -> None:
        self._error = self._error or StreamIdle(f"the client did not read a response for {self._write_timeout_s:g} s")
        self._interrupt()

    def _interrupt(self) -> None:
        self._timeout.reschedule(asyncio.get_running_loop().time())


class OpenCalls:
    """The calls of mal.v1 that run on one server.

    Args:
        limits: number of calls and streams, and the time of a response.
    """

    def __init__(self, limits: Connections) -> None:
        self._limits = limits
        self._calls: set[CallScope] = set()
        self._calls_of_token: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._calls)

    @contextmanager
    def opened(self, method: str, token: TokenScopes | None, *, is_stream: bool) -> Iterator[CallScope]:
        """A context in which a call is open.

        Raises:
            TooManyCalls: as many calls, or streams, as allowed are open.
        """
        self._check_limits(token, is_stream=is_stream)
        scope = CallScope(method, token, is_stream=is_stream, write_timeout_s=self._limits.stream_idle_s)
        name = "" if token is None else token.name
        self._calls.add(scope)
        self._calls_of_token[name] += 1
        try:
            yield scope
        finally:
            self._calls.discard(scope)
            self._calls_of_token[name] -= 1
            if not self._calls_of_token[name]:
                del self._calls_of_token[name]

    def check_tokens(self, check: Callable[[str, TokenScopes], None]) -> None:
        """Ends the calls whose token no longer allows them.

        Args:
            check: raises Unauthenticated or PermissionDenied for such a method and token.
        """
        for scope in tuple(self._calls):
            if scope.token is None:
                continue
            try:
                check(scope.method, scope.token)
            except (Unauthenticated, PermissionDenied) as error:
                scope.end(error)

    def _check_limits(self, token: TokenScopes | None, *, is_stream: bool) -> None:
        limits = self._limits
        if len(self._calls) >= limits.max_calls:
            raise TooManyCalls(f"connections.max_calls: {limits.max_calls} calls run already; try again later")
        share = max(limits.max_calls // 2, 1)
        if token is not None and self._calls_of_token[token.name] >= share:
            raise TooManyCalls(
                f"connections.max_calls: {share} calls of token {token.name!r} run already, half of all; retry later"
            )
        if not is_stream:
            return
        streams = [scope for scope in self._calls if scope.is_stream]
        if len(streams) >= limits.max_streams:
            raise TooManyStreams(f"connections.max_streams: {limits.max_streams} streams are open; try again later")
        own = sum(scope.token == token for scope in streams)
        if token is not None and own >= limits.max_streams_per_token:
            raise TooManyStreams(
                f"connections.max_streams_per_token: {own} streams of token {token.name!r} are open; close one, or try "
                "again later"
            )

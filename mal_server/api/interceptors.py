"""The interceptor of every call: authenticates it, receives its request, and turns exceptions into statuses."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from mal_server.api.call_record import CallRecord
from mal_server.api.grpc_server import UNKNOWN_METHOD
from mal_server.api.open_calls import OpenCalls
from mal_server.api.rate_limiter import RateLimiter
from mal_server.api.receiving import ReceiveLimiter
from mal_server.api.serialization.bounded_parse import bounded, max_fields
from mal_server.api.serialization.status import DOMAIN
from mal_server.config.server import ServerConfig
from mal_server.errors import InvalidRequest, PermissionDenied, RefusedItem, Unauthenticated
from mal_server.ops.metrics import Metrics
from mal_server.security.auth import TokenAuthenticator, TokenScopes
from mal_server.security.caller import caller_of, current_caller, host_of

MAX_SMALL_BYTES = 4096
"""Largest message of health checks and reflection, which strangers may send."""

SMALL_SLOTS = 8
SMALL_TIMEOUT_S = 5.0
SMALL_CONTESTED_S = 0.05
"""A small message comes with the first bytes of its call. MAX_SMALL_CALLS pass the slots within 1.6 s, so strangers
with unfinished messages delay a health check no longer. They refuse none of another host."""

MAX_SMALL_CALLS = 256
CONTESTED_S = 10.0

REFUSALS_PER_S = 200.0
"""Rate at which calls without a token are refused, see `RateLimiter`; a refusal takes 0.25 ms of CPU time."""
MAX_WAITING_REFUSALS = 1000

Responses = AsyncGenerator[Any, None]
Inner = Callable[[Any, Any], Responses]
"""Takes the request, or the stream of requests, and the context; yields the responses."""

Handler = Any
"""grpc.RpcMethodHandler, whose attributes gRPC's type stubs lack."""


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Authenticates every call and wraps its handler.

    Every method is served as a stream of requests, which is the same on the wire: so its request is read here, in a
    slot and with a time limit, instead of by gRPC, without either.

    Args:
        authenticator: checks tokens and scopes.
        calls: the running calls.
        config: bounds of messages that are being received.
        metrics: counts calls.
    """

    def __init__(
        self, authenticator: TokenAuthenticator, calls: OpenCalls, config: ServerConfig, metrics: Metrics
    ) -> None:
        self._authenticator = authenticator
        self._calls = calls
        self._metrics = metrics
        self._max_fields = max_fields(config.limits.max_boxes)
        connections = config.connections
        self._refusals = RateLimiter(REFUSALS_PER_S, burst=round(REFUSALS_PER_S), max_waiting=MAX_WAITING_REFUSALS)
        self._receiver = ReceiveLimiter(
            max(2, connections.max_receiving_bytes // config.limits.max_request_bytes),
            timeout_s=connections.receive_timeout_s,
            contested_s=CONTESTED_S,
            max_waiting=connections.max_calls,
        )
        self._small_receiver = ReceiveLimiter(
            SMALL_SLOTS,
            timeout_s=SMALL_TIMEOUT_S,
            contested_s=SMALL_CONTESTED_S,
            max_waiting=MAX_SMALL_CALLS,
            group_of=host_of,
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the handler of the method, wrapped so that every exception except a cancellation gets a status."""
        handler = await continuation(handler_call_details)
        # The name that a stranger gave to an unknown method reaches neither metrics nor log.
        method = UNKNOWN_METHOD if handler is None else handler_call_details.method
        metadata = tuple(handler_call_details.invocation_metadata or ())
        try:
            token = self._authenticator.authenticate(method, metadata)
        except (Unauthenticated, PermissionDenied) as error:
            return _rejecting_handler(CallRecord(method, metadata, "", self._metrics), error, self._refusals)
        if handler is None:
            return None
        if not method.startswith(f"/{DOMAIN}."):
            guarded = self._guard_small(CallRecord(method, metadata, "", None), handler)
            return _as_stream(handler, guarded, _small(handler.request_deserializer))
        record = CallRecord(method, metadata, "" if token is None else token.name, self._metrics)
        parse = bounded(handler.request_deserializer, self._max_fields)
        return _as_stream(handler, self._guard(record, method, token, handler), parse)

    def _guard(self, record: CallRecord, method: str, token: TokenScopes | None, handler: Handler) -> Inner:
        """Wraps a method of mal.v1."""
        inner = _as_generator(handler)

        async def guarded(requests: AsyncIterator[Any], context: Any) -> Responses:
            record.begin(context)
            caller = caller_of(token, context)
            current_caller.set(caller)
            try:
                with self._calls.opened(method, token, is_stream=handler.request_streaming) as scope:
                    if token is not None:  # the tokens may have changed since the call arrived
                        self._authenticator.check(method, token)
                    async with scope:
                        request: Any = _checked_stream(requests)
                        if not handler.request_streaming:
                            request = _checked(await self._receiver.receive(requests, caller.name))
                        async with aclosing(inner(request, context)) as responses:
                            async for response in responses:
                                with scope.writing():
                                    yield response
            except (asyncio.CancelledError, GeneratorExit):
                record.end("CANCELLED")
                raise
            # The only place where exceptions of our methods become statuses.
            except Exception as error:
                await record.abort(context, error)
            record.end("OK")

        return guarded

    def _guard_small(self, record: CallRecord, handler: Handler) -> Inner:
        """Wraps a method of gRPC itself, whose messages are small and whose callers may be strangers."""
        inner = _as_generator(handler)

        async def guarded(requests: AsyncIterator[Any], context: Any) -> Responses:
            try:
                messages = self._small_messages(requests, context.peer())
                request = messages if handler.request_streaming else await anext(messages, None)
                async with aclosing(inner(_checked(request), context)) as responses:
                    async for response in responses:
                        yield response
            except grpc.aio.AbortError:  # NOT_FOUND of a health check
                raise
            # As above, for the methods of gRPC.
            except Exception as error:
                await record.abort(context, error)

        return guarded

    async def _small_messages(self, requests: AsyncIterator[Any], peer: str) -> AsyncIterator[Any]:
        while (request := await self._small_receiver.receive(requests, peer)) is not None:
            yield _checked(request)


def _as_stream(handler: Handler, guarded: Inner, parse: Callable[[bytes], Any]) -> Handler:
    """Returns a handler of a stream of requests that takes the place of another handler."""
    return grpc.stream_stream_rpc_method_handler(
        guarded,
        request_deserializer=_catch_refusal(parse),
        response_serializer=_unless_encoded(handler.response_serializer),
    )


def _as_generator(handler: Handler) -> Inner:
    """Returns the method of a handler as a generator of its responses."""
    if handler.response_streaming:
        method: Inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        return method

    async def respond(request: Any, context: Any) -> Responses:
        yield await handler.unary_unary(request, context)

    return respond


def _rejecting_handler(record: CallRecord, error: Exception, refusals: RateLimiter) -> Handler:
    """Returns a handler that aborts the call. It is streaming on both sides for every method, so no request is read."""

    async def refuse(requests: AsyncIterator[Any], context: Any) -> Responses:
        await refusals.acquire()
        await record.abort(context, error)
        yield  # a generator, as tracing requires of a streaming handler

    return grpc.stream_stream_rpc_method_handler(refuse)


def _catch_refusal(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Returns a refused message as an exception object: raised here, it would become UNKNOWN in gRPC."""

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except InvalidRequest as error:
            return error.with_traceback(None)  # whose frames would keep the message in memory
        except DecodeError:
            return InvalidRequest([("", f"{len(data)} bytes; not a valid message of this method")])

    return read


def _unless_encoded(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Returns `serialize` for messages, and bytes as they are: large responses are encoded in a thread."""

    def encoded(response: Any) -> bytes:
        return response if isinstance(response, bytes) else serialize(response)

    return encoded


def _small(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Returns `parse` for messages of at most MAX_SMALL_BYTES; it raises InvalidRequest for larger ones."""

    def read(data: bytes) -> Any:
        if len(data) > MAX_SMALL_BYTES:
            raise InvalidRequest([("", f"{len(data)} bytes; a message of this method has at most {MAX_SMALL_BYTES}")])
        return parse(data)

    return read


def _checked(request: Any) -> Any:
    if request is None:
        raise InvalidRequest([("", "no message; this method needs one")])
    if isinstance(request, InvalidRequest):
        raise request
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yields the messages of a stream, a refused item among them: its method answers it, and the stream continues."""
    async for request in requests:
        yield request if isinstance(request, RefusedItem) else _checked(request)

"""The interceptor of every call: authenticates it, turns exceptions into statuses, and logs one line."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from mal_server.api.serialization.bounded_parse import bounded
from mal_server.api.serialization.status import DOMAIN, reason_of, retry_after, status_of
from mal_server.errors import InvalidRequest, PermissionDenied, Unauthenticated
from mal_server.ops.metrics import Metrics
from mal_server.security.auth import TokenAuthenticator

log = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
ID_KEY = "x-request-id"
MAX_ID_CHARS = 64

GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Authenticates every call and wraps the handlers of mal.v1; does not wrap gRPC's own (health, reflection).

    Args:
        authenticator: checks tokens and scopes.
        metrics: counts calls.
        max_fields: limit of fields in one message.
    """

    def __init__(self, authenticator: TokenAuthenticator, metrics: Metrics, max_fields: int) -> None:
        self._authenticator = authenticator
        self._metrics = metrics
        self._max_fields = max_fields

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the handler of the method, wrapped so that every exception except a cancellation gets a status."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        metadata = tuple(handler_call_details.invocation_metadata or ())
        try:
            caller = self._authenticator.authenticate(method, metadata)
        except (Unauthenticated, PermissionDenied) as error:
            return _rejecting_handler(_Call(method, _request_id(metadata), "", self._metrics), error)
        if handler is None or not method.startswith(f"/{DOMAIN}."):
            return handler
        call = _Call(method, _request_id(metadata), caller, self._metrics)
        serializers = {
            "request_deserializer": _catch_decode_error(bounded(handler.request_deserializer, self._max_fields)),
            "response_serializer": handler.response_serializer,
        }
        if not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(_guard_unary(call, handler.unary_unary), **serializers)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(call, handler.stream_stream, _checked_stream), **serializers
            )
        return grpc.unary_stream_rpc_method_handler(_guard_stream(call, handler.unary_stream, _checked), **serializers)


def _request_id(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """Returns the request id of the client if it is safe to log, otherwise a new one."""
    given = next((value for key, value in metadata if key == ID_KEY), "")
    if isinstance(given, str) and 0 < len(given) <= MAX_ID_CHARS and given.replace("-", "").isalnum():
        return given
    return uuid.uuid4().hex[:16]


def _rejecting_handler(call: "_Call", error: Exception) -> Any:
    """Returns a handler that aborts the call. It is streaming on both sides for every method, so no request is read."""

    async def refuse(requests: AsyncIterator[Any], context: Any) -> None:
        await call.abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _catch_decode_error(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Returns a refused message as an exception object: raised here, it would become UNKNOWN in gRPC."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except InvalidRequest as error:
            return error
        except DecodeError:
            return InvalidRequest([("", f"{len(data)} bytes; not a valid message of this method")])

    return read


def _checked(request: Any) -> Any:
    if isinstance(request, InvalidRequest):
        raise request
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _guard_unary(call: "_Call", inner: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        call.begin(context)
        try:
            response = await inner(_checked(request), context)
        except asyncio.CancelledError:
            call.end("CANCELLED")
            raise
        # The only place where exceptions become statuses.
        except Exception as error:
            await call.abort(context, error)
        call.end("OK")
        return response

    return guarded


def _guard_stream(
    call: "_Call", inner: Callable[[Any, Any], AsyncGenerator[Any, None]], check: Callable[[Any], Any]
) -> Callable[[Any, Any], Any]:
    async def guarded(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        call.begin(context)
        try:
            async with aclosing(inner(check(request), context)) as responses:
                async for response in responses:
                    yield response
        except (asyncio.CancelledError, GeneratorExit):
            call.end("CANCELLED")
            raise
        # The only place where exceptions become statuses.
        except Exception as error:
            await call.abort(context, error)
        call.end("OK")

    return guarded


class _Call:
    """Metrics, log line and status of one call. The trailers have its request id, so users can find the line."""

    def __init__(self, method: str, request_id: str, caller: str, metrics: Metrics) -> None:
        self._method = method.removeprefix("/")
        self._id = request_id
        self._caller = caller
        self._metrics = metrics
        self._started = time.perf_counter()

    def begin(self, context: Any) -> None:
        context.set_trailing_metadata(((ID_KEY, self._id),))

    def end(self, code: str, reason: str = "") -> None:
        duration_s = time.perf_counter() - self._started
        self._metrics.call_ended(self._method, code, duration_s)
        fields: dict[str, object] = {"method": self._method, "code": code, "took_ms": round(duration_s * 1000, 1)}
        fields |= {"request_id": self._id, **({"caller": self._caller} if self._caller else {})}
        log.info("call", extra={"fields": {**fields, **({"reason": reason} if reason else {})}})

    async def abort(self, context: Any, error: Exception) -> NoReturn:
        status = status_of(error)
        code, reason = GRPC_CODES[status.code], reason_of(error)
        self._metrics.rejected(reason)
        self.end(code.name, reason)
        trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString()), (ID_KEY, self._id)]
        retry_s = retry_after(status)
        if retry_s is not None:
            trailers.append((PUSHBACK_KEY, str(round(retry_s * 1000))))
        await context.abort(code, status.message, trailing_metadata=tuple(trailers))
        raise AssertionError("abort returned")

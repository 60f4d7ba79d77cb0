"""Turns errors into statuses and logs one line a call. The only file that knows status codes.

    UNAUTHENTICATED    UnknownCaller (reason NO_TOKEN)
    PERMISSION_DENIED  NotAllowed (reason MISSING_SCOPE)
    INVALID_ARGUMENT   RequestRefused (BadRequest: field paths) · BadImage (reason IMAGE_…) · BadBox (reason BAD_BOX)
    UNAVAILABLE        NotReady · Overloaded; with RetryInfo and the trailer grpc-retry-pushback-ms
    INTERNAL           OutOfDeviceMemory (reason OUT_OF_MEMORY) · everything else: the trace goes to the log under an
                       id, the client gets the id

`status_of` also serves the errors of single boxes and items, which travel inside a message of a call that succeeds.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from mal_server.access import Access
from mal_server.batcher import Overloaded
from mal_server.errors import NotAllowed, NotReady, RequestRefused, UnknownCaller
from mal_train.errors import BadBox, BadImage, OutOfDeviceMemory

log = logging.getLogger(__name__)

DOMAIN = "mal.v1"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
ID_NOTE = "error id "
LOADING_RETRY_S = 1.0
MAX_MESSAGE_CHARS = 2000
"""Trailers must stay small (gRPC's default limit for all metadata is 8 KiB)."""

GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}


def status_of(error: Exception) -> status_pb2.Status:
    """What a client is told about an error; an unexpected one is logged with its trace under an id."""
    known = _known(error)
    if known is not None:
        code, details = known
        return _status(code, str(error), *details)
    text = f"the server failed; its log says why under error id {_logged(error)}"
    return _status(code_pb2.INTERNAL, text, _info("UNEXPECTED"))


def _logged(error: Exception) -> str:
    """The id under which an error stands in the log; once, however many crops of a batch it concerns."""
    for note in getattr(error, "__notes__", ()):
        if note.startswith(ID_NOTE):
            return str(note.removeprefix(ID_NOTE))
    error_id = uuid.uuid4().hex[:12]
    log.error("error_id=%s unexpected %s", error_id, type(error).__name__, exc_info=error)
    error.add_note(ID_NOTE + error_id)
    return error_id


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Asks for tokens and wraps the handlers of our services; gRPC's own (health) pass unwrapped.

    Args:
        access: decides who may call.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of the method, guarded: no error but a cancellation leaves it without a status of ours."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        try:
            self._access.caller(method, handler_call_details.invocation_metadata or ())
        except (UnknownCaller, NotAllowed) as error:
            return _refusing(method, error)
        if handler is None or not method.startswith(f"/{DOMAIN}."):
            return handler
        codecs = {
            "request_deserializer": _tolerant(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(_guard_unary(method, handler.unary_unary), **codecs)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(method, handler.stream_stream, _readable_all), **codecs
            )
        return grpc.unary_stream_rpc_method_handler(_guard_stream(method, handler.unary_stream, _readable), **codecs)


def _refusing(method: str, error: Exception) -> Any:
    """A handler that ends the call at once. Streaming on both sides, whatever the method is: so nothing is read."""

    async def refuse(requests: AsyncIterator[Any], context: Any) -> None:
        await _Call(method).abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Gives bytes that are no such message as the error that they are: raised in here, gRPC would answer UNKNOWN."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return RequestRefused([("", f"{len(data)} bytes that are no message of this method")])

    return read


def _readable(request: Any) -> Any:
    if isinstance(request, RequestRefused):
        raise request
    return request


async def _readable_all(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _readable(request)


def _guard_unary(method: str, inner: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        call = _Call(method)
        try:
            answer = await inner(_readable(request), context)
        except asyncio.CancelledError:
            call.log("CANCELLED")
            raise
        # The one place where errors become statuses.
        except Exception as error:
            await call.abort(context, error)
        call.log("OK")
        return answer

    return guarded


def _guard_stream(
    method: str, inner: Callable[[Any, Any], AsyncGenerator[Any, None]], readable: Callable[[Any], Any]
) -> Callable[[Any, Any], Any]:
    async def guarded(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        call = _Call(method)
        try:
            async with aclosing(inner(readable(request), context)) as answers:
                async for answer in answers:
                    yield answer
        except (asyncio.CancelledError, GeneratorExit):
            call.log("CANCELLED")
            raise
        # The one place where errors become statuses.
        except Exception as error:
            await call.abort(context, error)
        call.log("OK")

    return guarded


class _Call:
    """One call's log line and its end."""

    def __init__(self, method: str) -> None:
        self._method = method.removeprefix("/")
        self._started = time.perf_counter()

    def log(self, code: str) -> None:
        took_ms = (time.perf_counter() - self._started) * 1000
        log.info("method=%s code=%s took_ms=%.1f", self._method, code, took_ms)

    async def abort(self, context: Any, error: Exception) -> NoReturn:
        status = status_of(error)
        code = GRPC_CODES[status.code]
        self.log(code.name)
        trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString())]
        retry_s = _retry_after(status)
        if retry_s is not None:
            trailers.append((PUSHBACK_KEY, str(round(retry_s * 1000))))
        await context.abort(code, status.message, trailing_metadata=tuple(trailers))
        raise AssertionError("abort returned")


def _known(error: Exception) -> tuple[int, tuple[Message, ...]] | None:
    """Code and details of an error that the contract names."""
    known: tuple[int, tuple[Message, ...]] | None = None
    match error:
        case UnknownCaller():
            known = code_pb2.UNAUTHENTICATED, (_info("NO_TOKEN"),)
        case NotAllowed():
            known = code_pb2.PERMISSION_DENIED, (_info("MISSING_SCOPE"),)
        case RequestRefused(violations=violations):
            known = code_pb2.INVALID_ARGUMENT, (_bad_request(violations),)
        case BadImage(reason=reason):
            known = code_pb2.INVALID_ARGUMENT, (_info(reason),)
        case BadBox():
            known = code_pb2.INVALID_ARGUMENT, (_info("BAD_BOX"),)
        case Overloaded(retry_after_s=seconds):
            known = code_pb2.UNAVAILABLE, (_info("QUEUE_FULL"), _retry(seconds))
        case NotReady():
            known = code_pb2.UNAVAILABLE, (_info("LOADING"), _retry(LOADING_RETRY_S))
        case OutOfDeviceMemory():
            known = code_pb2.INTERNAL, (_info("OUT_OF_MEMORY"),)
    return known


def _status(code: int, message: str, *details: Message) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=_shortened(message))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def _shortened(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"


def _bad_request(violations: Sequence[tuple[str, str]]) -> error_details_pb2.BadRequest:
    found = [error_details_pb2.BadRequest.FieldViolation(field=field, description=text) for field, text in violations]
    return error_details_pb2.BadRequest(field_violations=found)


def _info(reason: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(round(seconds * 1000))
    return info


def _retry_after(status: status_pb2.Status) -> float | None:
    info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds()) / 1000
    return None

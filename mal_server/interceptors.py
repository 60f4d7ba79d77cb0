"""Turns errors into statuses and logs one line a call. The only file that knows status codes.

    UNAUTHENTICATED    UnknownCaller (reason NO_TOKEN)
    PERMISSION_DENIED  NotAllowed (reason MISSING_SCOPE)
    INVALID_ARGUMENT   RequestRefused (BadRequest: field paths) · BadImage (reason IMAGE_…) · BadBox (reason BAD_BOX)
    UNAVAILABLE        NotReady · Overloaded · MemoryFull; with RetryInfo and the trailer grpc-retry-pushback-ms
                       DeviceLost (reason DEVICE_LOST); with RetryInfo: the supervisor starts a new process
    NOT_FOUND          NotThere (reasons MODEL_NOT_FOUND, FILE_NOT_FOUND, …)
    FAILED_PRECONDITION  NotNow (reasons WRONG_KEY, SELF_TEST_FAILED, RESUME_TOKEN_STALE, …)
    DEADLINE_EXCEEDED  Expired (reason EXPIRED)
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
from mal_server.batcher import Expired, Overloaded
from mal_server.errors import ComeBack, NotAllowed, NotNow, NotThere, RequestRefused, UnknownCaller
from mal_server.metrics import Metrics
from mal_train.errors import BadBox, BadImage, DeviceLost, OutOfDeviceMemory

log = logging.getLogger(__name__)

DOMAIN = "mal.v1"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
ID_NOTE = "error id "
RESTART_RETRY_S = 5.0
ID_KEY = "x-request-id"
MAX_ID_CHARS = 64
UNEXPECTED = "UNEXPECTED"
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
    return _status(code_pb2.INTERNAL, text, _info(UNEXPECTED))


def reason_of(error: Exception) -> str:
    """The short reason that `status_of` gives with an error, for counting."""
    known = _known(error)
    details = known[1] if known is not None else ()
    reasons = [detail.reason for detail in details if isinstance(detail, error_details_pb2.ErrorInfo)]
    if reasons:
        return str(reasons[0])
    return "BAD_REQUEST" if known is not None else UNEXPECTED


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
    """Asks for tokens and wraps the handlers of our services; gRPC's own (health, reflection) pass unwrapped.

    Args:
        access: decides who may call.
        metrics: counts calls.
    """

    def __init__(self, access: Access, metrics: Metrics) -> None:
        self._access = access
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of the method, guarded: no error but a cancellation leaves it without a status of ours."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        metadata = tuple(handler_call_details.invocation_metadata or ())
        try:
            caller = self._access.caller(method, metadata)
        except (UnknownCaller, NotAllowed) as error:
            return _refusing(_Call(method, _request_id(metadata), "", self._metrics), error)
        if handler is None or not method.startswith(f"/{DOMAIN}."):
            return handler
        call = _Call(method, _request_id(metadata), caller, self._metrics)
        codecs = {
            "request_deserializer": _tolerant(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if not handler.response_streaming:
            return grpc.unary_unary_rpc_method_handler(_guard_unary(call, handler.unary_unary), **codecs)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _guard_stream(call, handler.stream_stream, _readable_all), **codecs
            )
        return grpc.unary_stream_rpc_method_handler(_guard_stream(call, handler.unary_stream, _readable), **codecs)


def _request_id(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """The caller's own id where it is harmless in a log, else a new one."""
    given = next((value for key, value in metadata if key == ID_KEY), "")
    if isinstance(given, str) and 0 < len(given) <= MAX_ID_CHARS and given.replace("-", "").isalnum():
        return given
    return uuid.uuid4().hex[:16]


def _refusing(call: "_Call", error: Exception) -> Any:
    """A handler that ends the call at once. Streaming on both sides, whatever the method is: so nothing is read."""

    async def refuse(requests: AsyncIterator[Any], context: Any) -> None:
        await call.abort(context, error)

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


def _guard_unary(call: "_Call", inner: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        call.begin(context)
        try:
            answer = await inner(_readable(request), context)
        except asyncio.CancelledError:
            call.end("CANCELLED")
            raise
        # The one place where errors become statuses.
        except Exception as error:
            await call.abort(context, error)
        call.end("OK")
        return answer

    return guarded


def _guard_stream(
    call: "_Call", inner: Callable[[Any, Any], AsyncGenerator[Any, None]], readable: Callable[[Any], Any]
) -> Callable[[Any, Any], Any]:
    async def guarded(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        call.begin(context)
        try:
            async with aclosing(inner(readable(request), context)) as answers:
                async for answer in answers:
                    yield answer
        except (asyncio.CancelledError, GeneratorExit):
            call.end("CANCELLED")
            raise
        # The one place where errors become statuses.
        except Exception as error:
            await call.abort(context, error)
        call.end("OK")

    return guarded


class _Call:
    """One call's count, log line and end. Its id goes back in the trailers, so that people can name the line."""

    def __init__(self, method: str, request_id: str, caller: str, metrics: Metrics) -> None:
        self._method = method.removeprefix("/")
        self._id = request_id
        self._caller = caller
        self._metrics = metrics
        self._started = time.perf_counter()

    def begin(self, context: Any) -> None:
        context.set_trailing_metadata(((ID_KEY, self._id),))

    def end(self, code: str, reason: str = "") -> None:
        took_s = time.perf_counter() - self._started
        self._metrics.call_ended(self._method, code, took_s)
        fields: dict[str, object] = {"method": self._method, "code": code, "took_ms": round(took_s * 1000, 1)}
        fields |= {"request_id": self._id, **({"caller": self._caller} if self._caller else {})}
        log.info("call", extra={"fields": {**fields, **({"reason": reason} if reason else {})}})

    async def abort(self, context: Any, error: Exception) -> NoReturn:
        status = status_of(error)
        code, reason = GRPC_CODES[status.code], reason_of(error)
        self._metrics.rejected(reason)
        self.end(code.name, reason)
        trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, status.SerializeToString()), (ID_KEY, self._id)]
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
        case ComeBack(reason=reason, retry_after_s=seconds):
            known = code_pb2.UNAVAILABLE, (_info(reason), _retry(seconds))
        case DeviceLost():
            known = code_pb2.UNAVAILABLE, (_info("DEVICE_LOST"), _retry(RESTART_RETRY_S))
        case NotThere(reason=reason):
            known = code_pb2.NOT_FOUND, (_info(reason),)
        case NotNow(reason=reason):
            known = code_pb2.FAILED_PRECONDITION, (_info(reason),)
        case Expired():
            known = code_pb2.DEADLINE_EXCEEDED, (_info("EXPIRED"),)
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

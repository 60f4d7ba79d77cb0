"""What a call of the client may raise, in the caller's words; turns gRPC statuses into these errors.

    MalError
    ├── ClientError               a call did not end well
    │   ├── ServerUnavailable     nobody answers there, or the server is loading, draining or full
    │   ├── CallTimedOut          no answer within the deadline
    │   ├── CallCancelled         the call or its client was closed before the answer
    │   ├── ServerFailed          the server answered with its own fault, or with something that is no answer
    │   └── ModelChanged          other weights answered in the middle of a job
    └── InputError
        └── RequestRefused        the server (or the client, before sending) refuses the request; names the fields

A box or an image that fails inside a request that succeeds is no exception: see `ItemError` on the result.
"""

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from mal_train.core.errors import InputError, MalError

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"

CUT_SHORT = ("RST_STREAM", "Stream removed")
"""gRPC's words for a stream that ended without a status (1.62 and 1.85 both have them)."""

UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
"""OpenSSL's word, which gRPC passes on, for a server's certificate that no trusted authority has signed."""

RESPONSE_TOO_LARGE = "RESPONSE_TOO_LARGE"
"""Reason of an item whose masks do not fit into one message; fewer boxes at a time may."""


class ClientError(MalError):
    """A call to the server did not end well."""


class ServerUnavailable(ClientError):
    """No server answers at the address, or it is loading, draining or full."""


class CallTimedOut(ClientError):
    """No complete answer within the deadline."""


class CallCancelled(ClientError):
    """The call, or the client that made it, was closed before the answer came."""


class ServerError(ClientError):
    """The server failed inside, or broke the contract."""


class ModelChanged(ClientError):
    """The server switched to other weights in the middle of a job, so its answers do not belong together."""


@dataclass(frozen=True)
class FieldViolation:
    """One field of the request and the rule that it breaks."""

    field: str
    description: str


class InvalidRequest(InputError):
    """The request as a whole is refused.

    Attributes:
        reason: short code, for example IMAGE_DECODE_FAILED; empty where none was given.
        violations: the fields at fault, where the refusal names them.
    """

    def __init__(self, message: str, reason: str = "", violations: tuple[FieldViolation, ...] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.violations = violations


@dataclass(frozen=True)
class ItemError:
    """Why one box, image or dataset item has no mask.

    Attributes:
        code: gRPC status name, for example INVALID_ARGUMENT.
        reason: short code, for example IMAGE_DECODE_FAILED; empty where none was given.
        message: for people; names the thing, the value, the rule and the remedy.
        retry_after_s: the server's word that the same item may succeed after this many seconds; None when it will not.
    """

    code: str
    reason: str
    message: str
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.message} ({self.reason or self.code})"


@dataclass(frozen=True)
class StatusDetails:
    """The parts of google.rpc details that this client acts on."""

    reason: str = ""
    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None


def item_error(status: status_pb2.Status) -> ItemError | None:
    """The error of an item's status; None when it is OK."""
    if status.code == 0:
        return None
    details = _read_details(status)
    message = status.message or "the server gave no reason"
    return ItemError(_code_name(status.code), details.reason, message, details.retry_after_s)


def from_rpc_error(address: str, error: grpc.RpcError, timeout_s: float | None) -> MalError:
    """The exception to raise for a failed call to `address`; `timeout_s` is the deadline that the call had."""
    code, text, details = rpc_code(error), rpc_text(error), rpc_details(error)
    within = "the deadline" if timeout_s is None else f"{timeout_s:g} s"
    fields = "".join(f"; {v.field}: {v.description}" for v in details.violations if v.description not in text)
    why = "check the address, that mal-server runs there, and that both or neither use TLS"
    if UNTRUSTED in text:
        why = "its certificate is of no authority that is trusted here; give that one with --tls-ca (tls_ca)"
    if details.retry_after_s is not None:  # it is there, and has said why
        why = f"it says to come back in {details.retry_after_s:g} s"
    if code is grpc.StatusCode.UNAUTHENTICATED:
        fields += "; the client shows the one of --token-file (token)"
    refused = InvalidRequest(f"{address}: request refused: {text}{fields}", details.reason, details.violations)
    known: dict[grpc.StatusCode, MalError] = {
        grpc.StatusCode.UNAVAILABLE: ServerUnavailable(f"{address}: the server is unavailable ({text}); {why}"),
        grpc.StatusCode.DEADLINE_EXCEEDED: CallTimedOut(
            f"{address}: no complete answer within {within}; check the address, or allow more time"
        ),
        grpc.StatusCode.CANCELLED: CallCancelled(f"{address}: the call was cancelled before its answer came ({text})"),
        grpc.StatusCode.RESOURCE_EXHAUSTED: InvalidRequest(
            f"{address}: a message is larger than one side accepts ({text}); send a smaller or compressed image, or "
            "raise the server's message limit",
            "MESSAGE_TOO_LARGE",
        ),
        grpc.StatusCode.UNIMPLEMENTED: InvalidRequest(
            f"{address}: the server does not know this call ({text}); check that it is a mal-server of this version"
        ),
        **dict.fromkeys(_REFUSALS, refused),
    }
    return known.get(code, ServerError(f"{address}: the server failed: {code.name}: {text}"))


_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.ALREADY_EXISTS,
    }
)


def rpc_code(error: grpc.RpcError) -> grpc.StatusCode:
    """Status of a failed call; UNKNOWN for an error that carries none."""
    code = error.code() if callable(getattr(error, "code", None)) else None
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def is_disconnect(error: grpc.RpcError) -> bool:
    """Whether a failed call says nothing of its request, so that it may be sent again.

    UNAVAILABLE; CANCELLED, with which a server that closes may end calls that no handler of it has seen; and a stream
    that ended without a word of the server's own. Whoever cancelled the call itself must not ask.
    """
    return rpc_code(error) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) or is_truncated(error)


def is_truncated(error: grpc.RpcError) -> bool:
    """Whether a call's stream ended without trailers, as behind a proxy whose server died in the middle of it.

    nginx resets the stream, which gRPC reports as INTERNAL; HAProxy ends and resets it, which is UNKNOWN or CANCELLED.
    What mal-server itself means by these comes in trailers.
    """
    return (
        rpc_code(error) in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)
        and not _trailers(error)
        and any(words in rpc_text(error) for words in CUT_SHORT)
    )


def rpc_details(error: grpc.RpcError) -> StatusDetails:
    """Reason, field violations and retry time of a failed call, from its trailers."""
    trailers = _trailers(error)
    details = StatusDetails()
    packed = trailers.get(DETAILS_KEY)
    if isinstance(packed, bytes):
        try:
            details = _read_details(status_pb2.Status.FromString(packed))
        except DecodeError:
            # A proxy mangled the trailer; the status code and text still stand.
            details = StatusDetails()
    pushback = _seconds(trailers.get(PUSHBACK_KEY))
    if details.retry_after_s is None and pushback is not None:
        details = StatusDetails(details.reason, details.violations, pushback)
    return details


def _read_details(status: status_pb2.Status) -> StatusDetails:
    reason, retry_after_s = "", None
    violations: list[FieldViolation] = []
    for packed in status.details:
        if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            packed.Unpack(info)
            reason = info.reason
        elif packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            packed.Unpack(retry)
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            packed.Unpack(bad)
            violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
    return StatusDetails(reason, tuple(violations), retry_after_s)


def _trailers(error: grpc.RpcError) -> dict[str, Any]:
    read = getattr(error, "trailing_metadata", None)
    metadata = read() if callable(read) else None
    return {str(key): value for key, value in metadata or ()}


def rpc_text(error: grpc.RpcError) -> str:
    """A failed call's own words."""
    read = getattr(error, "details", None)
    text = read() if callable(read) else None
    return str(text) if text else "no details"


def _seconds(pushback: Any) -> float | None:
    try:
        milliseconds = int(pushback)
    except (TypeError, ValueError):
        return None
    return milliseconds / 1000 if milliseconds >= 0 else None


def _code_name(number: int) -> str:
    for code in grpc.StatusCode:
        if code.value[0] == number:
            return code.name
    return f"CODE_{number}"

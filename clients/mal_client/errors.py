"""Errors of the client, and their translation from gRPC statuses.

    MalError
    ├── ClientError               a call did not end with a result
    │   ├── ServerUnavailable     no server answers, or it is loading, draining or full
    │   ├── CallTimedOut          no complete result before the deadline
    │   ├── CallCancelled         the call or its client was closed before the result arrived
    │   ├── ServerError           the server failed, or sent what the protocol does not allow
    │   └── ModelChanged          other weights answered in the middle of a job
    ├── InputError                the caller's data is at fault
    │   ├── InvalidRequest        the server, or the client before sending, refuses the request; names the fields
    │   ├── BadImage              the image cannot be read or sent
    │   └── BadDataset            the COCO file as a whole is unusable
    ├── ConfigError               an option of the client or of a job is invalid
    └── OutputError               a result cannot be written

`MalError`, `InputError`, `BadImage`, `BadDataset`, `ConfigError` and `OutputError` are defined in
`mal_train.core.errors`. A box or an image that fails inside a request raises nothing: its result has an `ItemError`.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from mal_train.core.errors import InputError, MalError
from mal_train.core.proxies import server_hint

DETAILS_KEY: Final = "grpc-status-details-bin"
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"

TRUNCATED_TEXTS: Final = ("RST_STREAM", "Stream removed")
"""Texts of gRPC for a stream that ended without a status, in 1.62 as in 1.85."""

AGED_TEXT: Final = "max connection age"
"""gRPC's text for a call that a server ends because its connection is too old, in 1.62 as in 1.85."""

UNTRUSTED_TEXT: Final = "CERTIFICATE_VERIFY_FAILED"
"""Text of OpenSSL, in gRPC's message, for a server certificate that no trusted authority has signed."""

RESPONSE_TOO_LARGE: Final = "RESPONSE_TOO_LARGE"
"""Reason of an item whose masks exceed one message; fewer boxes at a time may fit."""

TOO_MANY_BOXES: Final = "TOO_MANY_BOXES"
"""Reason of an image with more boxes than one request may have, where all of its boxes must be in one."""

POINTS_UNSUPPORTED: Final = "POINTS_UNSUPPORTED"
"""Reason of a request with points to a server of a version that would ignore them."""

MESSAGE_TOO_LARGE: Final = "MESSAGE_TOO_LARGE"
"""Reason of a request or a response that exceeds a message limit of gRPC."""

STREAM_IDLE: Final = "STREAM_IDLE"
"""Reason with which a server ends a stream that has nothing in flight; another stream continues."""

MAX_RETRY_AFTER_S: Final = 3600.0
"""Longest retry time that the client follows; with a longer one an error is final."""

MAX_TEXT_CHARS: Final = 2000
"""Characters kept of each text of a server: messages are printed, logged and stored with every row."""

MAX_VIOLATIONS: Final = 100
"""Invalid fields kept of a refusal."""

_BOX_NUMBER: Final = re.compile(r"box -?[0-9]+: ")

_REFUSALS: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_TRUNCATED: Final = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)


def too_many_boxes(image: str, boxes: int, max_boxes: int) -> str:
    """Returns the message for an image whose boxes `resolve_overlaps` cannot take in one request."""
    return (
        f"{image}: {boxes} boxes; resolve_overlaps needs all boxes of an image in one request, and the server takes "
        f"{max_boxes}: raise its setting limits.max_boxes, or label without resolve_overlaps"
    )


class ClientError(MalError):
    """A call to the server did not end with a result."""


class ServerUnavailable(ClientError):
    """No server answers at the address, or it is loading, draining or full."""


class CallTimedOut(ClientError):
    """No complete result arrived before the deadline."""


class CallCancelled(ClientError):
    """The call, or the client that made it, was closed before the result arrived."""


class ServerError(ClientError):
    """The server failed, or sent what the protocol does not allow."""


class ModelChanged(ClientError):
    """The server switched to other weights in the middle of a job, so its masks do not belong together."""


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request, and the rule that its value breaks."""

    field: str
    description: str


class InvalidRequest(InputError):
    """The request as a whole is refused.

    Attributes:
        reason: code such as IMAGE_DECODE_FAILED; empty when the server sent none.
        violations: the invalid fields, when the refusal names them.
    """

    def __init__(self, message: str, reason: str = "", violations: tuple[FieldViolation, ...] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.violations = violations


@dataclass(frozen=True)
class ItemError:
    """Failure of one box, image or item of a dataset.

    Attributes:
        code: name of the gRPC status, for example INVALID_ARGUMENT.
        reason: code such as IMAGE_DECODE_FAILED; empty when the server sent none.
        message: text for users, with the value, the rule and the remedy.
        retry_after_s: seconds after which the same item may succeed; None when a retry cannot help.
    """

    code: str
    reason: str
    message: str
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.message} ({self.reason or self.code})"


@dataclass(frozen=True)
class StatusDetails:
    """Details of a status that the client acts on; see google.rpc.error_details."""

    reason: str = ""
    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None


def item_error(status: status_pb2.Status) -> ItemError | None:
    """Returns the error in the status of an item; None when the status is OK."""
    if status.code == 0:
        return None
    details = _read_details(status)
    message = _shortened(status.message) or "the server gave no reason"
    reason = details.reason
    # A server of version 0.1.0 sends no reason with this failure; its text names the limit.
    if not reason and any("max_response_bytes" in violation.description for violation in details.violations):
        reason = RESPONSE_TOO_LARGE
    return ItemError(_code_name(status.code), reason, message, details.retry_after_s)


def strip_box_number(message: str) -> str:
    """Removes the number of a box from the start of its message, where servers of version 0.1.0 write it.

    >>> strip_box_number("box 3: empty"), strip_box_number("empty")
    ('empty', 'empty')
    """
    found = _BOX_NUMBER.match(message)
    return message if found is None else message[found.end() :]


def from_rpc_error(address: str, error: grpc.RpcError, timeout_s: float | None) -> MalError:
    """Returns the exception to raise for a failed call.

    Args:
        address: of the server.
        error: of gRPC.
        timeout_s: deadline of the call in seconds; None without one.
    """
    code, text, proxy = rpc_code(error), rpc_text(error), server_hint(address)
    if code in _REFUSALS:
        return _refusal(address, error)
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerUnavailable(f"{address}: the server is unavailable ({text}); {_remedy(error)}{proxy}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        limit = "the deadline" if timeout_s is None else f"{timeout_s:g} s"
        return CallTimedOut(
            f"{address}: no complete result within {limit}; check the address, or raise the timeout{proxy}"
        )
    if code is grpc.StatusCode.CANCELLED:
        return CallCancelled(f"{address}: the call was cancelled before its result arrived ({text})")
    return ServerError(f"{address}: the server failed: {code.name}: {text}")


def _refusal(address: str, error: grpc.RpcError) -> InvalidRequest:
    code, text, details = rpc_code(error), rpc_text(error), rpc_details(error)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return InvalidRequest(
            f"{address}: a message exceeds the limit of client or server ({text}); send a smaller or compressed image, "
            "or raise the server's message limit",
            MESSAGE_TOO_LARGE,
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return InvalidRequest(
            f"{address}: the server does not know this call ({text}); check that it is a mal-server of this version"
        )
    fields = "".join(f"; {v.field}: {v.description}" for v in details.violations if v.description not in text)
    remedy = "; check the token (--token-file, token=)" if code is grpc.StatusCode.UNAUTHENTICATED else ""
    return InvalidRequest(f"{address}: request refused: {text}{fields}{remedy}", details.reason, details.violations)


def _remedy(error: grpc.RpcError) -> str:
    retry_after_s = rpc_details(error).retry_after_s
    if retry_after_s is not None:
        return f"try again in {retry_after_s:g} s"
    if is_aged(error):
        return "raise the server's connections.age_grace_s above the time of a call"
    if UNTRUSTED_TEXT in rpc_text(error):
        return "no trusted authority has signed its certificate; give the authority with --tls-ca (tls_ca=)"
    return "check the address, that mal-server runs there, and that both or neither use TLS"


def rpc_code(error: grpc.RpcError) -> grpc.StatusCode:
    """Returns the status of a failed call; UNKNOWN for an error without one."""
    code = error.code() if callable(getattr(error, "code", None)) else None
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def is_disconnect(error: grpc.RpcError) -> bool:
    """Returns whether a call failed for a reason unrelated to its request, so that the request may be sent again.

    That is UNAVAILABLE; CANCELLED, with which a closing server may end calls that no handler has seen; and a truncated
    stream. Do not use it for a call that the caller itself has cancelled.
    """
    return rpc_code(error) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) or is_truncated(error)


def is_truncated(error: grpc.RpcError) -> bool:
    """Returns whether a stream ended without trailers, as behind a proxy whose server died in the middle of a call.

    nginx resets the stream, which gRPC reports as INTERNAL; HAProxy ends and resets it, which is UNKNOWN or CANCELLED.
    mal-server sends trailers with these statuses.
    """
    return (
        rpc_code(error) in _TRUNCATED
        and not _trailers(error)
        and any(text in rpc_text(error) for text in TRUNCATED_TEXTS)
    )


def is_aged(error: grpc.RpcError) -> bool:
    """Returns True if a server ended a call for the age of its connection; a new connection continues at once."""
    return rpc_code(error) is grpc.StatusCode.UNAVAILABLE and AGED_TEXT in rpc_text(error)


def rpc_details(error: grpc.RpcError) -> StatusDetails:
    """Returns reason, field violations and retry time from the trailers of a failed call."""
    trailers = _trailers(error)
    details = StatusDetails()
    packed = trailers.get(DETAILS_KEY)
    if isinstance(packed, bytes):
        try:
            details = _read_details(status_pb2.Status.FromString(packed))
        except DecodeError:
            # A proxy damaged the trailer; status code and text are still valid.
            details = StatusDetails()
    pushback_s = _pushback_s(trailers.get(PUSHBACK_KEY))
    return replace(details, retry_after_s=pushback_s) if details.retry_after_s is None else details


def rpc_text(error: grpc.RpcError) -> str:
    """Returns the message of a failed call."""
    read = getattr(error, "details", None)
    text = read() if callable(read) else None
    return _shortened(str(text)) if text else "no details"


def _read_details(status: status_pb2.Status) -> StatusDetails:
    reason, retry_after_s = "", None
    violations: list[FieldViolation] = []
    for packed in status.details[:MAX_VIOLATIONS]:
        if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            packed.Unpack(info)
            reason = _shortened(info.reason)
        elif packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            packed.Unpack(retry)
            retry_after_s = _retry_after_s(retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)
        elif packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            packed.Unpack(bad)
            violations += [
                FieldViolation(_shortened(v.field), _shortened(v.description))
                for v in bad.field_violations[: MAX_VIOLATIONS - len(violations)]
            ]
    return StatusDetails(reason, tuple(violations), retry_after_s)


def _trailers(error: grpc.RpcError) -> dict[str, Any]:
    read = getattr(error, "trailing_metadata", None)
    metadata = read() if callable(read) else None
    return {str(key): value for key, value in metadata or ()}


def _pushback_s(text: Any) -> float | None:
    """Parses gRPC's pushback in milliseconds; a negative value forbids a retry."""
    try:
        milliseconds = int(text)
    except (TypeError, ValueError):
        return None
    # Compared first: an integer of any number of digits does not become a float.
    return _retry_after_s(milliseconds / 1000) if 0 <= milliseconds <= 1000 * MAX_RETRY_AFTER_S else None


def _retry_after_s(seconds: float) -> float | None:
    """Returns a retry time of a server; None for one that is too long, or before now."""
    return seconds if 0 <= seconds <= MAX_RETRY_AFTER_S else None


def _shortened(text: str) -> str:
    more = len(text) - MAX_TEXT_CHARS
    return text if more <= 0 else f"{text[:MAX_TEXT_CHARS]}… ({more} more characters)"


def _code_name(number: int) -> str:
    for code in grpc.StatusCode:
        if code.value[0] == number:
            return code.name
    return f"CODE_{number}"

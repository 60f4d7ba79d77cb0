"""Maps exceptions to gRPC statuses; the only module that does.

    UNAUTHENTICATED      Unauthenticated (reason NO_TOKEN)
    PERMISSION_DENIED    PermissionDenied (reason MISSING_SCOPE; FolderDenied: FOLDER_DENIED)
    INVALID_ARGUMENT     InvalidRequest (BadRequest with field paths; or reason RESPONSE_TOO_LARGE, CALL_TOO_LARGE)
                         BadImage (reason IMAGE_…) · BadPoint (reason BAD_POINT) · BadBox (reason BAD_BOX)
    UNAVAILABLE          NotReady · QueueFull · MemoryFull, with RetryInfo and the trailer grpc-retry-pushback-ms
                         DeviceLost (reason DEVICE_LOST), with RetryInfo: the supervisor restarts the process
    NOT_FOUND            NotFound (reasons MODEL_NOT_FOUND, FILE_NOT_FOUND, …)
    FAILED_PRECONDITION  FailedPrecondition (reasons WRONG_KEY, SELF_TEST_FAILED, RESUME_TOKEN_STALE, …)
    DEADLINE_EXCEEDED    DeadlineExceeded (reason EXPIRED)
    INTERNAL             OutOfDeviceMemory (reason OUT_OF_MEMORY) · every other exception (reason UNEXPECTED): the
                         traceback is logged under an error id, and the client receives only the id

The mapping holds for calls, and for single boxes and items that fail inside a successful call.
"""

import logging
import uuid
from collections.abc import Sequence

from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from mal_server.errors import FailedPrecondition, InvalidRequest, NotFound, PermissionDenied, Retryable, Unauthenticated
from mal_server.scheduling.admission import DeadlineExceeded, QueueFull
from mal_train.core.errors import BadBox, BadImage, BadPoint, DeviceLost, OutOfDeviceMemory

log = logging.getLogger(__name__)

DOMAIN = "mal.v1"
ID_NOTE = "error id "
RESTART_RETRY_S = 5.0
UNEXPECTED = "UNEXPECTED"
MAX_MESSAGE_CHARS = 2000
"""Keeps trailers small: gRPC's default limit for all metadata is 8 KiB."""


def status_of(error: Exception) -> status_pb2.Status:
    """Returns the status of an error; logs an unexpected one with its traceback under an error id."""
    known = _known(error)
    if known is not None:
        code, details = known
        # The result of a box carries its instance_id, so the message needs no other name for it.
        message = error.problem if isinstance(error, BadBox) else str(error)
        return _status(code, message, *details)
    message = f"internal error; the server's log has the cause under error id {_log_once(error)}"
    return _status(code_pb2.INTERNAL, message, _info(UNEXPECTED))


def reason_of(error: Exception) -> str:
    """Returns the reason in the status of an error, for metrics; BAD_REQUEST where the status has only field paths."""
    known = _known(error)
    details = known[1] if known is not None else ()
    reasons = [detail.reason for detail in details if isinstance(detail, error_details_pb2.ErrorInfo)]
    if reasons:
        return str(reasons[0])
    return "BAD_REQUEST" if known is not None else UNEXPECTED


def _log_once(error: Exception) -> str:
    """Returns the id of an error in the log. Logs it only once, even if it failed many crops of a batch."""
    for note in getattr(error, "__notes__", ()):
        if note.startswith(ID_NOTE):
            return str(note.removeprefix(ID_NOTE))
    error_id = uuid.uuid4().hex[:12]
    log.error("error_id=%s unexpected %s", error_id, type(error).__name__, exc_info=error)
    error.add_note(ID_NOTE + error_id)
    return error_id


def _known(error: Exception) -> tuple[int, tuple[Message, ...]] | None:
    """Returns code and details of an error of the contract; None for an unexpected one."""
    known: tuple[int, tuple[Message, ...]] | None = None
    match error:
        case Unauthenticated():
            known = code_pb2.UNAUTHENTICATED, (_info("NO_TOKEN"),)
        case PermissionDenied():
            known = code_pb2.PERMISSION_DENIED, (_info(error.reason),)
        case InvalidRequest(violations=violations, reason=reason):
            known = code_pb2.INVALID_ARGUMENT, (_bad_request(violations), *([_info(reason)] if reason else []))
        case BadImage(reason=reason):
            known = code_pb2.INVALID_ARGUMENT, (_info(reason),)
        case BadBox():
            reason = "BAD_POINT" if isinstance(error, BadPoint) else "BAD_BOX"
            known = code_pb2.INVALID_ARGUMENT, (_info(reason),)
        case QueueFull(retry_after_s=seconds):
            known = code_pb2.UNAVAILABLE, (_info("QUEUE_FULL"), _retry(seconds))
        case Retryable(reason=reason, retry_after_s=seconds):
            known = code_pb2.UNAVAILABLE, (_info(reason), _retry(seconds))
        case DeviceLost():
            known = code_pb2.UNAVAILABLE, (_info("DEVICE_LOST"), _retry(RESTART_RETRY_S))
        case NotFound(reason=reason):
            known = code_pb2.NOT_FOUND, (_info(reason),)
        case FailedPrecondition(reason=reason):
            known = code_pb2.FAILED_PRECONDITION, (_info(reason),)
        case DeadlineExceeded():
            known = code_pb2.DEADLINE_EXCEEDED, (_info("EXPIRED"),)
        case OutOfDeviceMemory():
            known = code_pb2.INTERNAL, (_info("OUT_OF_MEMORY"),)
    return known


def _status(code: int, message: str, *details: Message) -> status_pb2.Status:
    status = status_pb2.Status(code=code, message=_truncated(message))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def _truncated(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"


def _bad_request(violations: Sequence[tuple[str, str]]) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
            for field, problem in violations
        ]
    )


def _info(reason: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(round(seconds * 1000))
    return info


def retry_after(status: status_pb2.Status) -> float | None:
    """Returns the seconds of a status's RetryInfo, or None without one."""
    info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds()) / 1000
    return None

"""Errors of the server; `api.serialization.status` maps these and all others to gRPC statuses.

    MalError
    ├── InputError
    │   ├── InvalidRequest      INVALID_ARGUMENT     fields of a request break the contract; nothing was started
    │   │   ├── RefusedItem                          likewise one item of a stream, which was not parsed
    │   │   ├── ResponseTooLarge                     the masks of an item do not fit into one message
    │   │   └── CallTooLarge                         one call may never hold the memory that this one needs
    │   ├── Unauthenticated     UNAUTHENTICATED      no token, or an unknown one
    │   ├── PermissionDenied    PERMISSION_DENIED    the token lacks the scope of the method
    │   └── NotFound            NOT_FOUND            a request names something that is not here
    │       ├── UnknownModel                         a model
    │       ├── NoSuchFile                           a folder or file
    │       └── ImageNotCached                       an image that was evicted, or never sent
    ├── Retryable               UNAVAILABLE          the same call may succeed later
    │   ├── NotReady                                 the models are not loaded yet
    │   ├── MemoryFull                               other calls hold the memory that this one needs
    │   ├── TooManyCalls                             as many calls as allowed run already
    │   │   ├── TooManyStreams                       likewise streams
    │   │   └── TooManyLoads                         likewise loads of models
    │   ├── ReceiveTimeout                           the request did not arrive in time
    │   └── StreamIdle                               nothing was sent or read on the stream for too long
    ├── FailedPrecondition      FAILED_PRECONDITION  the request does not fit the state of the server
    │   ├── ModelRejected                            a model cannot be put into or taken out of service
    │   └── ResumeTokenStale                         an evaluation cannot resume from this token
    └── DeviceError
        └── SelfTestFailed      (none)               a model gives wrong results; the cause of a ModelRejected

`scheduling.batcher` defines QueueFull (UNAVAILABLE) and DeadlineExceeded (DEADLINE_EXCEEDED), since it imports no other
part of the server.
"""

from collections.abc import Sequence
from typing import Self

from mal_train.core.errors import DeviceError, InputError, MalError


class InvalidRequest(InputError):
    """A request that breaks the contract.

    Attributes:
        violations: pairs (path of the field, problem).
        reason: short code for clients; empty where the fields say it all.
    """

    reason = ""

    def __init__(self, violations: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {text}" for field, text in violations))
        self.violations = tuple(violations)

    def under(self, path: str) -> Self:
        """Returns the same error for a request that is a part of a message; `path` precedes the fields."""
        return type(self)([(f"{path}{field}", problem) for field, problem in self.violations])


class RefusedItem(InvalidRequest):
    """An item of a bulk stream that was refused before it was parsed; the stream continues.

    Attributes:
        item_id: the client's name for it; a very long one is truncated.
    """

    def __init__(self, violations: Sequence[tuple[str, str]], item_id: str) -> None:
        super().__init__(violations)
        self.item_id = item_id


class ResponseTooLarge(InvalidRequest):
    """The masks of one item do not fit into one message; the same item with fewer boxes may."""

    reason = "RESPONSE_TOO_LARGE"


class CallTooLarge(InvalidRequest):
    """A call that needs more memory than one call may ever hold; in several smaller calls it may succeed."""

    reason = "CALL_TOO_LARGE"

    def __init__(self, message: str) -> None:
        super().__init__(())
        self.args = (message,)


class Unauthenticated(InputError):
    """A call without a known token."""


class PermissionDenied(InputError):
    """A call whose token lacks the scope of the method. `reason` is that of its ErrorInfo."""

    reason = "MISSING_SCOPE"


class FolderDenied(PermissionDenied):
    """A request that names a folder which its token may not name."""

    reason = "FOLDER_DENIED"


class Retryable(MalError):
    """A call that may succeed later. `reason` is that of its ErrorInfo, `retry_after_s` the delay before a retry."""

    reason = "NOT_NOW"
    retry_after_s = 1.0


class NotReady(Retryable):
    """The models are not loaded yet."""

    reason = "LOADING"


class MemoryFull(Retryable):
    """Other calls hold the memory that this one needs, possibly for minutes."""

    reason = "MEMORY_FULL"
    retry_after_s = 30.0


class TooManyCalls(Retryable):
    """As many calls as allowed run already."""

    reason = "TOO_MANY_CALLS"


class TooManyStreams(TooManyCalls):
    """As many streams as allowed are open already, in all or with this token."""

    reason = "TOO_MANY_STREAMS"
    retry_after_s = 5.0


class TooManyLoads(TooManyCalls):
    """As many loads or unloads of models as allowed wait already, or as many replaced models are still in use."""

    reason = "TOO_MANY_LOADS"
    retry_after_s = 30.0


class ReceiveTimeout(Retryable):
    """The request of a call did not arrive in time."""

    reason = "RECEIVE_TIMEOUT"


class StreamIdle(Retryable):
    """A stream without a request, or with a response that its client did not read, for too long."""

    reason = "STREAM_IDLE"
    retry_after_s = 0.0


class NotFound(InputError):
    """Something that a request names is not here. `reason` is that of its ErrorInfo."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnknownModel(NotFound):
    """A name of no served model."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "MODEL_NOT_FOUND")


class NoSuchFile(NotFound):
    """A folder or a file that a request names. `reason` is FOLDER_NOT_FOUND, CHECKPOINT_NOT_FOUND or FILE_NOT_FOUND."""

    def __init__(self, message: str, reason: str = "FILE_NOT_FOUND") -> None:
        super().__init__(message, reason)


class ImageNotCached(NotFound):
    """An image that is not in the cache; the client sends it again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "IMAGE_NOT_CACHED")


class FailedPrecondition(MalError):
    """A request that does not fit the state of the server. `reason` is that of its ErrorInfo."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ModelRejected(FailedPrecondition):
    """A model that cannot be put into or taken out of service; served models are unchanged."""


class ResumeTokenStale(FailedPrecondition):
    """A resume token that does not fit the request or the served model."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "RESUME_TOKEN_STALE")


class SelfTestFailed(DeviceError):
    """A model that gives wrong results on the synthetic image."""

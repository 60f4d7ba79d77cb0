"""Errors that only a server can have; mal_server.api.serialization.status gives them, and all others, their status.

    MalError
    ├── InputError
    │   ├── RequestRefused    fields of a request break the contract; nothing was started
    │   ├── UnknownCaller     a call shows no token, or one that is not known
    │   ├── NotAllowed        its token lacks the method's scope
    │   └── NotThere          what a request names is not here
    │       ├── UnknownModel  a name under which nothing is served
    │       ├── NoSuchFile    a folder or a file
    │       └── ImageNotCached  a picture that was sent before, or never
    ├── ComeBack              the same call may succeed later
    │   ├── NotReady          the model is not loaded yet
    │   └── MemoryFull        other calls hold the memory that this one needs
    ├── NotNow                the request is well-formed and does not fit the state of the server
    │   ├── ModelRefused      a model could not be put into service or taken out of it; what was served goes on
    │   └── TokenStale        an evaluation cannot go on where it broke off
    └── DeviceError
        └── SelfTestFailed    a model gives no sensible answer to a picture whose answer is known

`Overloaded` stays in the batcher, which knows of nothing else.
"""

from collections.abc import Sequence

from mal_train.core.errors import DeviceError, InputError, MalError


class InvalidRequest(InputError):
    """A request breaks the contract.

    Attributes:
        violations: pairs (path of the field, problem).
        reason: short code for clients; empty where the fields say it all.
    """

    reason = ""

    def __init__(self, violations: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {text}" for field, text in violations))
        self.violations = tuple(violations)


class ResponseTooLarge(InvalidRequest):
    """The masks of one item do not fit into one message; the same item with fewer boxes may."""

    reason = "RESPONSE_TOO_LARGE"


class Unauthenticated(InputError):
    """A call whose caller is not known."""


class PermissionDenied(InputError):
    """A call whose caller is known and may not make it."""


class Retryable(MalError):
    """The same call may succeed later. `reason` says in one word why not now, `retry_after_s` when to try again."""

    reason = "NOT_NOW"
    retry_after_s = 1.0


class NotReady(Retryable):
    """No model is loaded yet."""

    reason = "LOADING"


class MemoryFull(Retryable):
    """Other calls hold the memory that this one needs, for minutes perhaps."""

    reason = "MEMORY_FULL"
    retry_after_s = 30.0


class NotFound(InputError):
    """What a request names is not here. `reason` says in one word what is missing."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnknownModel(NotFound):
    """A name under which nothing is served."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "MODEL_NOT_FOUND")


class NoSuchFile(NotFound):
    """A folder or a file that a request names. `reason` is FOLDER_NOT_FOUND, CHECKPOINT_NOT_FOUND or FILE_NOT_FOUND."""

    def __init__(self, message: str, reason: str = "FILE_NOT_FOUND") -> None:
        super().__init__(message, reason)


class ImageNotCached(NotFound):
    """A picture that the server holds no more, or never held; its sender sends it again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "IMAGE_NOT_CACHED")


class FailedPrecondition(MalError):
    """A request that does not fit the state of the server. `reason` says why in one word."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ModelRejected(FailedPrecondition):
    """A model could not be put into service or taken out of it; what was served goes on."""


class ResumeTokenStale(FailedPrecondition):
    """An evaluation cannot go on where it broke off."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "RESUME_TOKEN_STALE")


class SelfTestFailed(DeviceError):
    """A model on its device does not answer the test picture as it should."""

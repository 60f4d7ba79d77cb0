"""Defines every error that the project raises on purpose.

    MalError                    1  root of the tree
    ├── InputError              2  the caller: one input is unusable, the rest of the work continues
    │   ├── BadImage            2  bytes that do not decode, exceed a limit or differ from the stated size
    │   ├── BadBox              2  a box that is not finite, is empty or lies outside its image
    │   │   └── BadPoint        2  a point that corrects the mask of a box, which no mask of the box can obey
    │   ├── BadDataset          2  a COCO file or a row's mask that cannot be read
    │   │   └── BadGroundTruth  2  a row without a mask to compare with; its reason tells why
    │   └── StorageError        2  an object in a store that cannot be read; its reason tells why
    ├── StoreUnreachable        1  a store that does not answer, or not in time; a later run may succeed
    ├── ConfigError             2  the user: a spec, a setting, a flag or an override
    ├── CheckpointError         2  the user: a checkpoint that cannot be used
    │   ├── WrongKey            2  the key does not decrypt the file, is missing, or the key header is damaged
    │   ├── Truncated           2  the end of the file is missing
    │   ├── Altered             2  the content differs from what was encrypted
    │   ├── Untrusted           2  another SHA-256 than the required one, or no signature of a trusted signer
    │   └── UnknownLayout       2  the schema or the weight layout is not supported by this version
    ├── DeviceError             1  this process: the device failed on a batch
    │   ├── OutOfDeviceMemory   1  one crop alone does not fit into device memory
    │   └── DeviceLost          1  every batch fails until the process restarts
    ├── LostProcess             1  another process of the same job exited
    ├── OutputError             4  the machine: disk full, no permission, or another run writes the same output
    ├── NonFiniteTraining       5  the data or the settings: losses or weights are no longer finite
    └── Terminated            143  SIGTERM: results so far are saved

The number is the exit code of a command that ends with the error; the text names the party at fault. An error that is
not in this tree is a bug and also exits with 1. Messages name the thing, its value, the rule and the remedy. No class
knows a gRPC status: `mal_server.api.interceptors` maps errors to statuses.
"""

from typing import ClassVar


class MalError(Exception):
    """Root of the tree.

    Attributes:
        exit_code: exit code of a command that ends with this error.
    """

    exit_code: ClassVar[int] = 1


class InputError(MalError):
    """An input of the caller that is unusable. Exit code 2."""

    exit_code = 2


class BadImage(InputError):
    """An image that is unusable. The caller's fault; exit code 2.

    Attributes:
        reason: IMAGE_DECODE_FAILED, IMAGE_FORMAT, IMAGE_TOO_LARGE, IMAGE_SIZE_MISMATCH or IMAGE_NOT_FOUND.
    """

    def __init__(self, message: str, reason: str = "IMAGE_DECODE_FAILED") -> None:
        super().__init__(message)
        self.reason = reason


class BadBox(InputError):
    """A box that has no mask: not finite, empty, or outside its image. The caller's fault; exit code 2.

    Args:
        problem: the value, the rule and the remedy.
        box: names the box at the start of the message, for example "box 3"; empty where the context names it.

    Attributes:
        problem: the message without the name of the box.
    """

    def __init__(self, problem: str, box: str = "") -> None:
        super().__init__(f"{box}: {problem}" if box else problem)
        self.problem = problem


class BadPoint(BadBox):
    """A box with a point that no mask of the box can obey, or with too many. The caller's fault; exit code 2.

    Attributes:
        reason: POINT_NOT_FINITE, POINT_OUTSIDE_IMAGE, POINT_OUTSIDE_BOX (a positive one), POINTS_CONTRADICT (a positive
            and a negative one on one pixel) or TOO_MANY_POINTS.
    """

    def __init__(self, problem: str, reason: str, box: str = "") -> None:
        super().__init__(problem, box)
        self.reason = reason


class BadDataset(InputError):
    """A COCO file, or the mask of one of its rows, that cannot be read. The caller's fault; exit code 2."""


class BadGroundTruth(BadDataset):
    """A row without a mask that others can be compared with. The caller's fault; exit code 2.

    Attributes:
        reason: NO_GROUND_TRUTH, BAD_GROUND_TRUTH or EMPTY_GROUND_TRUTH.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class StorageError(InputError):
    """An object in a store or on a web server that cannot be read. The caller's fault; exit code 2.

    Attributes:
        reason: NOT_FOUND, BUCKET_NOT_FOUND, ACCESS_DENIED (of one object), NO_CREDENTIALS, CREDENTIALS_REFUSED (of all
            objects), TOO_LARGE, CHANGED (while it was read), HOST_NOT_ALLOWED or FAILED.
    """

    def __init__(self, message: str, reason: str = "FAILED") -> None:
        super().__init__(message)
        self.reason = reason


class StoreUnreachable(MalError):
    """A store that cannot be reached, or that fails or times out on every attempt. Exit code 1."""


class ConfigError(MalError):
    """A setting that is unknown, of the wrong type or out of range. The user's fault; exit code 2."""

    exit_code = 2


class CheckpointError(MalError):
    """A checkpoint that cannot be used. Exit code 2."""

    exit_code = 2


class WrongKey(CheckpointError):
    """A key that does not decrypt the file, or a damaged key header. The user's fault; exit code 2."""


class Truncated(CheckpointError):
    """A file without its end, for example an incomplete copy. The file's fault; exit code 2."""


class Altered(CheckpointError):
    """A file whose content differs from what was encrypted. The file's fault; exit code 2."""


class Untrusted(CheckpointError):
    """A file with another SHA-256 than the required one, or without the signature of a trusted signer. Exit code 2."""


class UnknownLayout(CheckpointError):
    """A schema version or a weight layout that this version does not support. Exit code 2."""


class DeviceError(MalError):
    """A failure of the device during a batch. Not the caller's fault; exit code 1."""


class OutOfDeviceMemory(DeviceError):
    """One crop that does not fit into device memory even alone. Not the caller's fault; exit code 1."""


class DeviceLost(DeviceError):
    """A device that fails every batch until this process restarts. Not the caller's fault; exit code 1."""


class LostProcess(MalError):
    """The exit of another process of the same job; that process reports the cause. Exit code 1."""


class OutputError(MalError):
    """A result that cannot be written: disk full, no permission, output in use. Exit code 4."""

    exit_code = 4


class NonFiniteTraining(MalError):
    """Losses or weights that are no longer finite numbers. Exit code 5."""

    exit_code = 5


class Terminated(MalError):
    """SIGTERM, which ended the command after it saved its results so far. Exit code 143."""

    exit_code = 143

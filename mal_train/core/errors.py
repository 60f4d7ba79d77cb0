"""Every error that the project raises on purpose. No gRPC in it: mal_server.api.interceptors alone knows status codes.

    MalError
    ├── InputError            what the caller gave is at fault; the rest of the work goes on
    │   ├── BadImage          bytes that are no picture we read, too large, or of another size than stated
    │   ├── BadBox            NaN, empty, or wholly outside its image
    │   └── BadDataset        a COCO file that cannot be used as a whole
    ├── ConfigError           a spec, a setting, a flag or an override
    ├── CheckpointError       a checkpoint that cannot be used
    │   ├── WrongKey          the key does not open it, none was given, or its header is damaged
    │   ├── Truncated         its end is missing
    │   ├── Altered           its content was changed after it was sealed
    │   └── UnknownLayout     a schema or a weight layout that this version does not read
    ├── DeviceError           the device failed under a batch; ours, not the caller's
    │   ├── OutOfDeviceMemory one crop alone does not fit
    │   └── DeviceLost        it fails every batch from now on, until the process starts anew
    ├── LostProcess           another process of the same work has gone
    ├── OutputError           disk full, no permission, another run writes there
    └── NonFiniteTraining     loss or weights stopped being numbers

A message names the thing, the value, the rule and the remedy. `exit_code` is what a command returns for it.
"""

from typing import ClassVar


class MalError(Exception):
    """Root of the tree; catching it catches what the project foresaw and nothing else."""

    exit_code: ClassVar[int] = 1


class InputError(MalError):
    """The caller's data is at fault."""

    exit_code = 2


class BadImage(InputError):
    """An image that cannot be used.

    `reason` is one of IMAGE_DECODE_FAILED, IMAGE_FORMAT, IMAGE_TOO_LARGE, IMAGE_SIZE_MISMATCH, IMAGE_NOT_FOUND.
    """

    def __init__(self, message: str, reason: str = "IMAGE_DECODE_FAILED") -> None:
        super().__init__(message)
        self.reason = reason


class BadBox(InputError):
    """A box for which no mask can be made.

    Args:
        problem: the value, the rule and the remedy.
        box: names the box at the start of the message, for example "box 3"; empty where the context names it.

    Attributes:
        problem: the message without the name of the box.
    """

    def __init__(self, problem: str, box: str = "") -> None:
        super().__init__(f"{box}: {problem}" if box else problem)
        self.problem = problem


class BadDataset(InputError):
    """A COCO file that cannot be used as a whole."""


class ConfigError(MalError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class CheckpointError(MalError):
    """A checkpoint cannot be used."""

    exit_code = 2


class WrongKey(CheckpointError):
    """The key does not open the file, or the part that holds the key is damaged."""


class Truncated(CheckpointError):
    """The end of the file is missing."""


class Altered(CheckpointError):
    """The content differs from what was sealed."""


class UnknownLayout(CheckpointError):
    """A schema version or a layout of weights that this version does not read."""


class DeviceError(MalError):
    """The device failed while it worked on a batch."""


class OutOfDeviceMemory(DeviceError):
    """One crop alone does not fit into the device's memory."""


class DeviceLost(DeviceError):
    """The device's state is damaged for as long as this process lives; every further batch would fail too."""


class LostProcess(MalError):
    """Another process that works on the same thing has gone; its own message, if it had time for one, tells why."""


class OutputError(MalError):
    """A result could not be written."""

    exit_code = 4


class NonFiniteTraining(MalError):
    """Losses or weights stopped being finite numbers."""

    exit_code = 5

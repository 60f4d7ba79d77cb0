"""Reads files that untrusted text names: below one folder, regular, and of limited size."""

import errno
import io
import os
import stat
from pathlib import Path

_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def resolve_inside(folder: Path, name: str) -> Path | None:
    """Returns the real path of `name` relative to a folder; None if it leads outside.

    Neither "..", an absolute name nor a symbolic link leads outside; a link to a place inside the folder is followed.
    The file may be missing.
    """
    root = os.path.realpath(folder)
    try:
        resolved = Path(os.path.realpath(os.path.join(root, name)))
    # ValueError: a NUL character; OSError, RuntimeError: a loop of links.
    except (OSError, ValueError, RuntimeError):
        return None
    return resolved if resolved.is_relative_to(root) else None


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of a regular file: at most `max_bytes` + 1, so that one byte too many shows a larger file.

    Raises:
        OSError: the file cannot be opened, or is a folder, pipe or device, which may have no end.
        ValueError: the path has a NUL character.
    """
    with open_regular(path) as file:
        # Of the stated size first: `read` alone would grow its buffer step by step.
        return file.read(max(0, min(os.fstat(file.fileno()).st_size, max_bytes)) + 1)


def open_regular(path: Path, buffer_bytes: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    """Opens a regular file for reading.

    Raises:
        OSError: the file cannot be opened, or is a folder, pipe or device.
        ValueError: the path has a NUL character.
    """
    # Non-blocking: opening a named pipe would otherwise block forever.
    descriptor = os.open(path, os.O_RDONLY | _NONBLOCK | _BINARY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.BufferedReader(io.FileIO(descriptor), buffer_bytes)

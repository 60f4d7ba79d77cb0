"""Writes files atomically: after a crash at any point, a file has either its old or its new content.

All results are written through this module. Source of the protocol: Pillai et al., "All File Systems Are Not
Created Equal", OSDI 2014.
"""

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from mal_train.core.errors import OutputError

PIPE_CLOSED = 141
"""Exit code of a command whose standard output was closed by its reader (`| head`): 128 + SIGPIPE."""

_BUFFER = 1 << 20
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDY = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the file size limit",
    errno.ENOENT: "create its folder first",
}


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file that replaces `path` when the block ends without an error.

    Writes a temporary file in the same folder, syncs and renames it, and syncs the folder. Follows symbolic links.

    Raises:
        OutputError: any OSError in the block (folder missing, no permission, disk full). The old file is unchanged and
            the temporary file is removed.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with ExitStack() as remove_on_error:
            with temporary.open("xb", buffering=_BUFFER) as file:
                remove_on_error.callback(temporary.unlink, missing_ok=True)
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            remove_on_error.pop_all()
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: not written ({error.strerror or error}); {remedy_of(error)}. An existing file is unchanged"
        ) from error


def remedy_of(error: OSError) -> str:
    """Returns what a user can do about an error of a write."""
    return _REMEDY.get(error.errno or 0, "choose a writable location")


def check_writable(path: Path) -> None:
    """Checks before long work that `atomic_write` can write `path`. The disk may still fill up later.

    Raises:
        OutputError: the path is a folder, or its folder is missing or not writable.
    """
    folder = Path(os.path.realpath(path)).parent
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file name")
    if not folder.is_dir():
        raise OutputError(f"{path}: its folder does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: its folder is not writable; choose a writable location")


def stdout_exit_code(error: OSError) -> int | None:
    """Returns the exit code for an error on standard output: 141 closed by its reader, 4 disk full, None another error.

    For 141 and 4, redirects standard output to /dev/null: otherwise Python reports the error again at exit, when it
    flushes the stream.
    """
    if error.errno not in (errno.EPIPE, *_DISK_FULL):
        return None
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED if error.errno == errno.EPIPE else OutputError.exit_code


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file by `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def _sync_folder(folder: Path) -> None:
    """Flushes the names of a folder to the disk, where the system allows it."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows, which opens no folders
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        # The folder is writable but not readable. The file is in place; only a power cut can still undo the rename.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (network, FUSE) cannot sync a folder. PostgreSQL ignores the same error for folders.
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)

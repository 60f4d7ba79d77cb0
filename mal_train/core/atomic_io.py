"""Files that are the old ones or the new ones, whatever happens in between: the one way results reach the disk.

Source of the protocol: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
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
"""Exit code of a command whose output nobody reads any more (`| head`), as a shell counts it."""

_BUFFER = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDY = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the file size limit",
    errno.ENOENT: "make its folder first",
}


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well.

    Temporary file in the same folder, fsync, rename, fsync of the folder. A symbolic link is followed.

    Raises:
        OutputError: for any OSError within (folder missing, no permission, disk full); the old file is intact and the
            temporary one is removed.
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
        remedy = _REMEDY.get(error.errno or 0, "choose a place that can be written to")
        raise OutputError(
            f"{path}: not written ({error.strerror or error}); {remedy}. A file that was there before is unchanged"
        ) from error


def check_writable(path: Path) -> None:
    """Says before hours of work what `atomic_write` would say after them; a disk may still fill up in between.

    Raises:
        OutputError: the path is a folder, its folder is missing or may not be written to.
    """
    folder = Path(os.path.realpath(path)).parent
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if not folder.is_dir():
        raise OutputError(f"{path}: its folder does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: its folder may not be written to; choose a place that can be written to")


def stdout_fault(error: OSError) -> int | None:
    """Exit code when standard output takes no more: 141 its reader has gone, 4 the disk is full; None: another fault.

    What is left to print goes nowhere then: Python would complain once more when it closes the stream.
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
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

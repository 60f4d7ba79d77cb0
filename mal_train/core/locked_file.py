"""Files that are locked against other processes, on POSIX systems and on Windows."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from mal_train.core.errors import OutputError

# Windows has msvcrt instead of fcntl. The lock of either ends with the process, even with a killed one. A system that
# has neither gets an exclusive lock file; a killed process leaves it behind, and the user must delete it.
fcntl: Any = None
msvcrt: Any = None
try:
    import fcntl
except ModuleNotFoundError:
    with suppress(ModuleNotFoundError):
        import msvcrt

IN_USE: Final = "another run is writing this output; wait for it, or choose another output"

# msvcrt locks single bytes, which only the handle of the lock can read then; its offsets have 31 bits.
_LOCKED_OFFSET: Final = 2**31 - 2
O_BINARY: Final = getattr(os, "O_BINARY", 0)
NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)
"""Flag with which `os.open` refuses a symbolic link; 0 on Windows, where few users may create one."""
NON_BLOCKING: Final = getattr(os, "O_NONBLOCK", 0)
"""Flag with which `os.open` does not wait for the other end of a pipe."""
IS_WINDOWS: Final = os.name == "nt"


def no_follow(path: str | os.PathLike[str], flags: int) -> int:
    """Opens a file but no symbolic link; the argument `opener` of `open` for a file that is changed in place.

    Raises:
        OSError: ELOOP for a link, ENXIO for a pipe without a reader.
    """
    return os.open(path, flags | NO_FOLLOW | NON_BLOCKING | O_BINARY, 0o666)


class LockedFile:
    """File that is locked against other processes until it is closed; created when it is missing. A context manager.

    `read_at` and `write_at` are safe in threads. A symbolic link is refused: another user of the folder could choose by
    it which file is changed.

    Args:
        path: the file.
        in_use: rule and remedy in the error when another process holds the lock.

    Raises:
        OutputError: another process holds the lock, the file cannot be created or locked, or is a link, device or pipe.
    """

    def __init__(self, path: Path, in_use: str = IN_USE) -> None:
        self.path = path
        self._position = threading.Lock()
        self._is_removed_on_close = False
        self._file, self._unlock = _open_locked(path, in_use)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Size in bytes."""
        return os.fstat(self._file).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns up to `length` bytes, starting at `offset`."""
        with self._position:
            os.lseek(self._file, offset, os.SEEK_SET)
            return os.read(self._file, length)

    def write_at(self, offset: int, data: bytes) -> None:
        """Writes `data` at `offset`. Raises OSError, after which a part may be written."""
        written = 0
        with self._position:
            os.lseek(self._file, offset, os.SEEK_SET)
            while written < len(data):
                written += os.write(self._file, data[written:])

    def lines(self, start: int = 0) -> Iterator[bytes]:
        """Yields the lines from byte `start` on with their line ends. Do not read or write between two of them."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(start)
            yield from file

    def truncate(self, size: int) -> None:
        """Truncates the file to `size` bytes."""
        os.ftruncate(self._file, size)

    def sync(self) -> None:
        """Flushes the file to the disk."""
        os.fsync(self._file)

    def remove(self) -> None:
        """Deletes the file; the lock ends with `close`."""
        try:
            self.path.unlink(missing_ok=True)
        except PermissionError:
            if not IS_WINDOWS:
                raise
            # Windows does not delete open files.
            self._is_removed_on_close = True

    def close(self) -> None:
        """Ends the lock; the file stays. May be called more than once."""
        if self._file < 0:
            return
        self._unlock()
        os.close(self._file)
        self._file = -1
        if self._is_removed_on_close:
            self.path.unlink(missing_ok=True)


def _open_locked(path: Path, in_use: str) -> tuple[int, Callable[[], None]]:
    while True:
        try:
            file = no_follow(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OutputError(f"{path}: is a symbolic link, which is not followed; remove it") from error
            raise OutputError(
                f"{path}: cannot be created ({error.strerror}); choose an output that can be written to"
            ) from error
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OutputError(f"{path}: is a device or pipe; choose another output")
        try:
            unlock = _lock(file, path)
        except (BlockingIOError, PermissionError, FileExistsError) as error:
            os.close(file)
            stale = f" (or delete {error.filename})" if isinstance(error, FileExistsError) else ""
            raise OutputError(f"{path}: {in_use}{stale}") from None
        except OSError as error:
            os.close(file)
            raise OutputError(f"{path}: cannot be locked ({error.strerror}); choose a local disk") from error
        if is_still_at(path, file):
            return file, unlock
        # Another process removed the file between the two calls.
        unlock()
        os.close(file)


def is_still_at(path: Path, file: int) -> bool:
    """Returns True if `path` names the open file: not another one, nothing, or a link."""
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def try_lock(file: int) -> bool:
    """Locks an open file until its last descriptor is closed; returns False if another process holds the lock.

    Raises:
        OSError: the file system, or Windows, has no such locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(file: int, path: Path) -> Callable[[], None]:
    """Locks an open file; returns a function that unlocks it before it is closed.

    Raises:
        BlockingIOError, PermissionError, FileExistsError: another process holds the lock.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lambda: None
    if msvcrt is not None:
        os.lseek(file, _LOCKED_OFFSET, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

        def unlock() -> None:
            os.lseek(file, _LOCKED_OFFSET, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

        return unlock
    lock_file = path.with_name(f"{path.name}.lock")
    os.close(os.open(lock_file, os.O_CREAT | os.O_EXCL))
    return lambda: lock_file.unlink(missing_ok=True)

"""A file that one process at a time may change, on POSIX systems and on Windows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from mal_train.core.errors import OutputError

# Windows has msvcrt in place of fcntl. Both locks end with the process, however it ends. A system with neither gets an
# exclusive lock file, which a killed process leaves behind for the user to delete.
fcntl: Any = None
msvcrt: Any = None
try:
    import fcntl
except ModuleNotFoundError:
    try:
        import msvcrt
    except ModuleNotFoundError:
        msvcrt = None

IN_USE: Final = "another run is writing this output; wait for it, or choose another output"

# msvcrt locks bytes, and nobody else may read those; its offsets have 31 bits. No file is expected to reach this one.
_LOCKED_OFFSET: Final = 2**31 - 2
_O_BINARY: Final = getattr(os, "O_BINARY", 0)
IS_WINDOWS: Final = os.name == "nt"


class LockedFile:
    """A file, created when it is missing, that no other process can open so until it is closed. A context manager.

    Reads and writes are safe in threads: none of them depends on the position of the file.

    Args:
        path: the file.
        in_use: text of the error when another process holds it.

    Raises:
        OutputError: another process holds the file, or it cannot be created or locked.
    """

    def __init__(self, path: Path, in_use: str = IN_USE) -> None:
        self.path = path
        self._position = threading.Lock()
        self._is_removed_on_close = False
        self._file, self._unlock = _open_locked(path, in_use)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Size in bytes."""
        return os.fstat(self._file).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Returns up to `length` bytes from `offset` on."""
        with self._position:
            os.lseek(self._file, offset, os.SEEK_SET)
            return os.read(self._file, length)

    def write_at(self, offset: int, data: bytes) -> None:
        """Writes all of `data` at `offset`. Raises OSError; a part may be written then."""
        written = 0
        with self._position:
            os.lseek(self._file, offset, os.SEEK_SET)
            while written < len(data):
                written += os.write(self._file, data[written:])

    def lines(self) -> Iterator[bytes]:
        """Yields the lines of the file with their ends; read or write nothing else meanwhile."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            yield from file

    def truncate(self, size: int) -> None:
        """Cuts the file off after `size` bytes."""
        os.ftruncate(self._file, size)

    def sync(self) -> None:
        """Waits until the disk has what was written."""
        os.fsync(self._file)

    def remove(self) -> None:
        """Deletes the file; the lock ends with `close`."""
        try:
            self.path.unlink(missing_ok=True)
        except PermissionError:
            if not IS_WINDOWS:
                raise
            # Windows deletes no open file.
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
            file = os.open(path, os.O_RDWR | os.O_CREAT | _O_BINARY, 0o666)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be created ({error.strerror}); choose an output that can be written to"
            ) from error
        try:
            unlock = _lock(file, path)
        except (BlockingIOError, PermissionError, FileExistsError) as error:
            os.close(file)
            stale = f" (or delete {error.filename})" if isinstance(error, FileExistsError) else ""
            raise OutputError(f"{path}: {in_use}{stale}") from None
        except OSError as error:
            os.close(file)
            raise OutputError(f"{path}: cannot be locked ({error.strerror}); choose a local disk") from error
        if _is_still_at(path, file):
            return file, unlock
        # The run before finished, and removed the file, between the two calls.
        unlock()
        os.close(file)


def _is_still_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: int, path: Path) -> Callable[[], None]:
    """Locks an open file; returns what ends the lock before the file is closed.

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

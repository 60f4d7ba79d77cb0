"""Writes files atomically: after a crash at any point, a file has either its old or its new content.

All results are written through this module. Source of the protocol: Pillai et al., "All File Systems Are Not
Created Equal", OSDI 2014.

A temporary file is locked while its process lives, so that a later run can tell the one that a killed run left behind.
"""

import errno
import hashlib
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, repeat
from pathlib import Path
from typing import BinaryIO, Final

from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.locked_file import IS_WINDOWS, NO_FOLLOW, NON_BLOCKING, O_BINARY, is_still_at, no_follow, try_lock

PIPE_CLOSED = 141
"""Exit code of a command whose standard output was closed by its reader (`| head`): 128 + SIGPIPE."""
TEMPORARY_SUFFIX: Final = ".mal-tmp"

_BUFFER = 1 << 20
_MAX_SHOWN_NAME = 200
"""Bytes of a file name up to which its temporary file shows it; file systems allow 255, with all that is added."""
_ACCESS_LIST = "system.posix_acl_access"
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDY = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the file size limit",
    errno.ENOENT: "create its folder first",
}


@contextmanager
def atomic_write(path: Path, *, mode: int = 0o666, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Yields a new file that replaces `path` when the block ends without an error.

    Writes a temporary file in the same folder, syncs and renames it, and syncs the folder. A replaced file hands on its
    owner, group and permissions. Symbolic links in the folder of `path` are followed, but `path` itself must not be a
    link: another user of the folder could choose by it which file is overwritten.

    Args:
        path: the file.
        mode: permission bits of a file that is new, before the umask.
        overwrite: False refuses a file that exists, also one that appears while the block runs.

    Raises:
        OutputError: `path` is a link, folder, device or pipe, or any OSError in the block (folder missing, no
            permission, disk full). The old file is unchanged and the temporary file is removed.
    """
    old = _replaceable(path)
    if old is not None and not overwrite:
        raise _exists(path)
    target = Path(os.path.realpath(path.parent)) / path.name
    try:
        temporary, descriptor = _create_temporary(target, mode if old is None else 0o600)
        # On an error the temporary file is removed before it is closed: its lock ends then.
        with os.fdopen(descriptor, "wb", buffering=_BUFFER) as file, ExitStack() as remove_on_error:
            remove_on_error.callback(temporary.unlink, missing_ok=True)
            if IS_WINDOWS:  # which neither deletes nor renames an open file
                remove_on_error.callback(file.close)
            if old is not None:
                _hand_on_access(path, old, descriptor)
            yield file
            file.flush()
            os.fsync(descriptor)
            if IS_WINDOWS:
                file.close()
            _rename(temporary, target, overwrite=overwrite)
            remove_on_error.pop_all()
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: not written ({error.strerror or error}); {remedy_of(error)}. An existing file is unchanged"
        ) from error


def remove_stale_temporaries(folder: Path) -> None:
    """Removes temporary files in a folder that killed processes of this user have left behind; takes one listing.

    A file that another process still writes is locked, and stays. So do all where the file system has no locks.
    """
    try:
        with os.scandir(folder) as entries:
            paths = [Path(entry.path) for entry in entries if _is_temporary(entry.name)]
    except OSError:
        return
    for path in paths:
        _remove_if_stale(path)


def remedy_of(error: OSError) -> str:
    """Returns what a user can do about an error of a write."""
    return _REMEDY.get(error.errno or 0, "choose a writable location")


def check_writable(path: Path) -> None:
    """Checks before long work that `atomic_write` can write `path`. The disk may still fill up later.

    Raises:
        OutputError: the path is a link, folder, device or pipe, or its folder is missing or not writable.
    """
    _replaceable(path)
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: its folder does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: its folder is not writable; choose a writable location")


def refuse_same_file(source: Path, output: Path) -> None:
    """Protects an input, which an output would replace.

    Raises:
        ConfigError: the output is the input, by whatever path.
    """
    if is_same_file(source, output):
        raise ConfigError(f"output {output}: is an input of the same command; choose another file")


def is_same_file(path: Path, other: Path) -> bool:
    """Returns True if both paths lead to one file that exists."""
    return path.exists() and other.exists() and path.samefile(other)


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
    """Writes a UTF-8 file by `atomic_write`; half of a surrogate pair, which JSON can hold, becomes its escape."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def drop_partial_line(path: Path) -> None:
    """Truncates a file after its last line break; a killed process may have left part of a line behind it."""
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        with open(path, "r+b", opener=no_follow) as file:
            file.truncate(content.rfind(b"\n") + 1)


def _replaceable(path: Path) -> os.stat_result | None:
    """Returns the status of the regular file at `path`; None if nothing is there.

    Raises:
        OutputError: something else is there.
    """
    try:
        status = path.lstat()
    except OSError:  # reported by the write
        return None
    if stat.S_ISREG(status.st_mode):
        return status
    if stat.S_ISLNK(status.st_mode):
        raise OutputError(
            f"{path}: is a symbolic link, and results are not written through links; give the file that it should "
            "name, or remove the link"
        )
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
    raise OutputError(f"{path}: is {kind}; give a file name")


def _exists(path: Path) -> OutputError:
    return OutputError(f"{path}: already exists and is not overwritten; choose another name or remove it")


def _create_temporary(target: Path, mode: int) -> tuple[Path, int]:
    """Creates and locks a temporary file beside `target`; returns its path and its descriptor.

    Its name depends on that of `target` alone, so that at most one is left behind, which the next write removes. A
    random name is taken while another process uses that one.
    """
    name = os.fsencode(target.name)
    shown = target.name if len(name) <= _MAX_SHOWN_NAME else hashlib.sha256(name).hexdigest()
    fixed = target.with_name(f".{shown}{TEMPORARY_SUFFIX}")
    _remove_if_stale(fixed)
    for path in chain([fixed], map(_with_random_name, repeat(fixed))):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW | O_BINARY, mode)
        except FileExistsError:
            continue
        try:
            is_locked = try_lock(descriptor)
        except OSError:  # no locks here: `_remove_if_stale` removes nothing
            is_locked = True
        # A cleaning process may have taken the new file for a stale one before it was locked.
        if is_locked and is_still_at(path, descriptor):
            return path, descriptor
        os.close(descriptor)
    raise AssertionError("random names do not end")


def _with_random_name(fixed: Path) -> Path:
    return fixed.with_name(f"{fixed.stem}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def _remove_if_stale(path: Path) -> None:
    """Removes a temporary file unless a process holds its lock, or it is no regular file of this user."""
    if IS_WINDOWS:  # which deletes no open file
        with suppress(OSError):
            path.unlink()
        return
    try:
        descriptor = os.open(path, os.O_RDWR | NON_BLOCKING | NO_FOLLOW)
    except OSError:
        return
    with suppress(OSError):
        status = os.fstat(descriptor)
        is_own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        if is_own and try_lock(descriptor) and is_still_at(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _hand_on_access(path: Path, old: os.stat_result, descriptor: int) -> None:
    """Gives a new file the owner, group and permissions of the file that it replaces, or less; never more."""
    if not hasattr(os, "fchown"):  # Windows, where files inherit the access list of their folder
        return
    mode = stat.S_IMODE(old.st_mode) & 0o777
    new = os.fstat(descriptor)
    if old.st_uid != new.st_uid:
        with suppress(OSError):  # only root may
            os.fchown(descriptor, old.st_uid, -1)
    if old.st_gid != new.st_gid:
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except OSError:
            # The bits for the group were meant for another one.
            mode &= ~stat.S_IRWXG
    # Of a file with an access list, the bits for the group limit its entries, and the group itself may have less.
    if not (mode & stat.S_IRWXG and _hand_on_access_list(path, descriptor)):
        mode &= ~stat.S_IRWXG
    os.fchmod(descriptor, mode)


def _hand_on_access_list(path: Path, descriptor: int) -> bool:
    """Gives a new file the POSIX access list of the file at `path`, or none; returns False if that fails."""
    if not hasattr(os, "getxattr"):  # only Linux has them
        return True
    old, new = _access_list(path), _access_list(descriptor)
    try:
        if old is not None:
            os.setxattr(descriptor, _ACCESS_LIST, old)
        elif new is not None:  # of the folder
            os.removexattr(descriptor, _ACCESS_LIST)
    except OSError:
        return False
    return True


def _access_list(file: Path | int) -> bytes | None:
    try:
        return os.getxattr(file, _ACCESS_LIST)
    except OSError:  # none, or a file system without them
        return None


def _rename(temporary: Path, target: Path, *, overwrite: bool) -> None:
    if overwrite:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target, follow_symlinks=False)
    except FileExistsError:
        raise _exists(target) from None
    except OSError:  # a file system without links
        if os.path.lexists(target):
            raise _exists(target) from None
        temporary.replace(target)
        return
    temporary.unlink()


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

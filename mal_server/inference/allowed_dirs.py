"""Files that requests may name: only those in configured folders. Knows nothing of gRPC.

A request gives a folder's configured name and a path relative to it. Neither ".." nor a symbolic link leads outside.
`open` also excludes races between check and use: it checks the location of the open file before reading it. `path`
does not, since checkpoints and annotation files are opened later: write access to their folders implies trust.
"""

import difflib
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from mal_server.errors import InvalidRequest, NoSuchFile
from mal_train.core.input_files import resolve_inside

MAX_PATH_CHARS = 4096

MAX_SHOWN_CHARS = 64
"""Length of the longest name of a model or a folder; a longer one in a request is shown truncated."""

MAX_SHOWN_NAMES = 32
"""Known names that are compared with an unknown one and listed; comparing takes up to 0.1 ms each."""


def shown(name: str) -> str:
    """Returns a name from a request in quotes, at most MAX_SHOWN_CHARS characters of it.

    >>> shown("cats"), len(shown("a" * 1000))
    ("'cats'", 67)
    """
    return repr(name) if len(name) <= MAX_SHOWN_CHARS else f"{name[:MAX_SHOWN_CHARS]!r}…"


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message for an unknown name: the closest known one, and the known ones.

    >>> suggest("foto", ["photos", "scans"])
    "; did you mean 'photos'? available: photos, scans"
    """
    names = list(known)
    if not names:
        return "; none is available"
    listed = names[:MAX_SHOWN_NAMES]
    # No name is longer, and comparing takes the product of both lengths.
    close = difflib.get_close_matches(name, listed, n=1, cutoff=0.6) if len(name) <= MAX_SHOWN_CHARS else []
    meant = f" did you mean {close[0]!r}?" if close else ""
    more = f" and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
    return f";{meant} available: {', '.join(listed)}{more}"


class AllowedDirs:
    """Folders by name.

    Args:
        folders: name in requests → folder.
        setting: the setting that lists them, for error messages.
    """

    def __init__(self, folders: Mapping[str, Path], setting: str) -> None:
        self._folders = dict(folders)
        self._setting = setting

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the folders, in configured order."""
        return tuple(self._folders)

    def path(self, name: str, relative_path: str, field: str = "path") -> Path:
        """Returns the resolved path of a file or folder.

        Args:
            name: configured name of the folder.
            relative_path: parts joined by "/"; "": the folder itself.
            field: field of the request, for error messages.

        Raises:
            InvalidRequest: the path is absolute, too long, or has empty, "." or ".." parts.
            NoSuchFile: no folder has this name, or nothing in it has this path.
        """
        root = self._root(name)
        _check_form(relative_path, field)
        resolved = resolve_inside(root, relative_path)
        if resolved is None or not os.path.exists(resolved):
            # One error for both: a client learns nothing about files elsewhere.
            raise _not_found(name, relative_path)
        return resolved

    def open(self, name: str, relative_path: str, field: str = "path") -> BinaryIO:
        """Opens a regular file for reading.

        Takes the arguments of `path` and raises its errors; NoSuchFile also if the path is not a regular file.
        """
        root = self._root(name)
        path = self.path(name, relative_path, field)
        try:
            # Non-blocking: opening a named pipe would block the thread forever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise _not_found(name, relative_path) from None
        file = os.fdopen(descriptor, "rb")
        # Another process may have replaced a part of the path since its check.
        location = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not location.is_relative_to(root):
            file.close()
            raise _not_found(name, relative_path)
        return file

    def _root(self, name: str) -> Path:
        folder = self._folders.get(name)
        if folder is None:
            hint = suggest(name, self.names)
            raise NoSuchFile(f"folder {shown(name)}: not in the server's {self._setting}{hint}", "FOLDER_NOT_FOUND")
        return Path(os.path.realpath(folder))


def _not_found(name: str, relative_path: str) -> NoSuchFile:
    return NoSuchFile(f"{name}/{relative_path}: no such file on the server")


def _check_form(relative_path: str, field: str) -> None:
    if "\0" in relative_path or len(relative_path) > MAX_PATH_CHARS:
        raise InvalidRequest([(field, f"{len(relative_path)} characters; give at most {MAX_PATH_CHARS} and no NUL")])
    parts = relative_path.split("/")
    if relative_path and any(part in {"", ".", ".."} for part in parts):
        raise InvalidRequest([(field, f"{relative_path!r}; give a relative path without empty, '.' or '..' parts")])

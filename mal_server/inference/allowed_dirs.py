"""Files that requests may name: those below folders of the server's settings, and no others. Knows nothing of gRPC.

A request gives a folder by its name in the settings and a path below it. Neither ".." nor a link leads out. For
pictures (`open`) no race between look and use does either: what was opened is asked where it lies before a byte of it
is read. Checkpoints and annotation files are opened later, by the path that was found: who can write into their folders
is trusted.
"""

import difflib
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from mal_server.errors import InvalidRequest, NoSuchFile

MAX_PATH_CHARS = 4096


def suggest(name: str, known: Iterable[str]) -> str:
    """What to say after an unknown name: the one that was probably meant, and all that there are."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    listed = f"; there are {', '.join(names)}" if names else "; there are none"
    return (f"; did you mean {close[0]!r}?" if close else "") + listed


class AllowedDirs:
    """Folders by name.

    Args:
        folders: name in requests → folder.
        setting: what the settings call them, for messages.
    """

    def __init__(self, folders: Mapping[str, Path], setting: str) -> None:
        self._folders = dict(folders)
        self._setting = setting

    @property
    def names(self) -> tuple[str, ...]:
        """Of the folders, in the order of the settings."""
        return tuple(self._folders)

    def path(self, name: str, below: str, field: str = "path") -> Path:
        """The file or folder below the folder `name`, its links followed.

        Args:
            name: of the folder.
            below: relative path with "/" between its parts; "" = the folder itself.
            field: of the request, for messages.

        Raises:
            RequestRefused: a path that is none or that leads out of the folder.
            NoSuchFile: no folder of this name, or nothing there.
        """
        folder = self._folders.get(name)
        if folder is None:
            raise NoSuchFile(
                f"folder {name!r}: not among the server's {self._setting}{suggest(name, self.names)}",
                "FOLDER_NOT_FOUND",
            )
        _check_form(below, field)
        root = Path(os.path.realpath(folder))
        try:
            found = Path(os.path.realpath(root / below, strict=True))
        except (OSError, ValueError, RuntimeError):
            raise NoSuchFile(f"{name}/{below}: no such file on the server") from None
        if not found.is_relative_to(root):
            # A link that leads out answers as nothing does, so that nobody learns what lies elsewhere.
            raise NoSuchFile(f"{name}/{below}: no such file on the server")
        return found

    def open(self, name: str, below: str, field: str = "path") -> BinaryIO:
        """A regular file, opened for reading. Errors as `path`."""
        root = Path(os.path.realpath(self._folders.get(name, Path())))
        path = self.path(name, below, field)
        try:
            # Not blocking: a pipe that somebody put there must not hold up a thread for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise NoSuchFile(f"{name}/{below}: no such file on the server") from None
        file = os.fdopen(descriptor, "rb")
        opened_at = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not opened_at.is_relative_to(root):
            file.close()
            raise NoSuchFile(f"{name}/{below}: no such file on the server")
        return file


def _check_form(below: str, field: str) -> None:
    if "\0" in below or len(below) > MAX_PATH_CHARS:
        raise InvalidRequest([(field, f"a path has at most {MAX_PATH_CHARS} characters and no NUL")])
    parts = below.split("/")
    if below and (below.startswith("/") or any(part in {"", ".", ".."} for part in parts)):
        raise InvalidRequest([(field, f"{below!r}; give a relative path without empty, '.' or '..' parts")])

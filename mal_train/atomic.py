"""Files that are the old ones or the new ones, whatever happens in between: the one way results reach the disk.

Source of the protocol: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from mal_train.errors import OutputError

_BUFFER = 1 << 20
_REMEDY = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the file size limit",
    errno.ENOENT: "make its folder first",
}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
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


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file by `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

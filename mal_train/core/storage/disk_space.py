"""Errors of the disk with the temporary files: copies of remote files, and results before their upload."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from mal_train.core.errors import OutputError
from mal_train.core.storage.addresses import redact

_REMEDY: Final = "set TMPDIR to a folder with more space"


def check_space(address: str, size: int) -> None:
    """Raises OutputError if a copy of a remote file of `size` bytes does not fit on the disk."""
    folder = tempfile.gettempdir()
    if size > shutil.disk_usage(folder).free:
        raise OutputError(f"{redact(address)}: {size} bytes do not fit into {folder}; {_REMEDY}")


@contextmanager
def disk_errors(address: str) -> Iterator[None]:
    """Turns the errors of writing the temporary file of a remote one into OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{redact(address)}: its temporary file in {tempfile.gettempdir()} cannot be written ({error.strerror}); "
            f"{_REMEDY}"
        ) from None

"""Opens JSON files, also those that gzip compressed, whatever their name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from mal_train.core.errors import BadDataset
from mal_train.core.input_files import open_unzipped

_READ_BYTES: Final = 1 << 18


@contextmanager
def open_json(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for reading its text as bytes; errors while it is read are BadDataset, too.

    A compressed file may be a thousand times larger in memory: read it in parts, and limit their sum, where it comes
    from strangers.

    Raises:
        BadDataset: the file is missing or unreadable, or its compressed content is damaged.
    """
    try:
        with open_unzipped(path) as file:
            yield file
    except OSError as error:
        detail = error.strerror or str(error)
        raise BadDataset(f"{path}: cannot be read ({detail}); give the path of a COCO JSON file") from error


def text_size(path: Path, limit: int) -> int:
    """Returns the bytes of a JSON file without compression, counted up to one above `limit`. Raises as `open_json`."""
    size = 0
    with open_json(path) as file:
        while size <= limit and (chunk := file.read(_READ_BYTES)):
            size += len(chunk)
    return min(size, limit + 1)

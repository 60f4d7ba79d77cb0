"""Reads JSON files, also those that gzip compressed, whatever their name; writes them, compressed if named `.gz`."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, Final, cast

from mal_train.core.atomic_io import atomic_write
from mal_train.core.errors import BadDataset
from mal_train.core.input_files import GZIP_SUFFIX, cause_of, open_unzipped, without_gzip

_READ_BYTES: Final = 1 << 18
_GZIP_LEVEL: Final = 6
_CONVERTED: Final = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "yolo or dota, which take its folder, or csv",
    ".xml": "voc, which takes its folder, or cvat",
}
"""Formats of box files, by their suffix."""
_OF_FOLDERS: Final = "yolo, voc, dota or labelme"
"""Formats that have a file for each image."""


@contextmanager
def open_json(path: Path, instead: str | None = None) -> Iterator[IO[bytes]]:
    """Opens a file for reading its text as bytes; errors while it is read are BadDataset, too.

    A compressed file may be a thousand times larger in memory: read it in parts, and limit their sum, where it comes
    from strangers.

    Args:
        path: the file.
        instead: what to give in its place, for errors; None: `remedy`.

    Raises:
        BadDataset: the file is missing or unreadable, or its compressed content is damaged.
    """
    try:
        with open_unzipped(path) as file:
            yield file
    except OSError as error:
        detail = "is a folder" if path.is_dir() else cause_of(error)
        raise BadDataset(f"{path}: cannot be read ({detail}); {instead or remedy(path)}") from error


def remedy(name: object) -> str:
    """Returns what to give in place of a file that is no JSON, by the suffix of its name.

    >>> remedy("boxes.csv.gz")
    'give a COCO annotation file, or convert it with mal-client convert --from csv'
    """
    path = Path(str(name))
    formats = _OF_FOLDERS if path.is_dir() else _CONVERTED.get(PurePath(without_gzip(path.name)).suffix.lower())
    return "give a COCO annotation file" + (
        "" if formats is None else f", or convert it with mal-client convert --from {formats}"
    )


@contextmanager
def create_json(path: Path) -> Iterator[IO[bytes]]:
    """Creates a JSON file atomically for writing its text as bytes; compressed by gzip if its name ends in `.gz`.

    Raises:
        OutputError: as `atomic_write`.
    """
    with atomic_write(path) as file:
        if path.suffix.lower() != GZIP_SUFFIX:
            yield file
            return
        # Without name and time, equal texts give equal bytes.
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed:
            yield cast(IO[bytes], packed)


def side_path(output: Path, end: str) -> Path:
    """Returns the path beside an output that has its name, without the suffixes, and another end.

    >>> side_path(Path("a/out.json.gz"), ".masks").as_posix(), side_path(Path("out.parquet"), ".masks").as_posix()
    ('a/out.masks', 'out.masks')
    """
    return output.with_name(f"{PurePath(without_gzip(output.name)).stem}{end}")


def errors_path(output: Path) -> Path:
    """Returns the list of what a job could not label or convert: `out.errors.jsonl` beside `out.json`."""
    return side_path(output, ".errors.jsonl")


def text_size(path: Path, limit: int) -> int:
    """Returns the bytes of a JSON file without compression, counted up to one above `limit`. Raises as `open_json`."""
    size = 0
    with open_json(path) as file:
        while size <= limit and (chunk := file.read(_READ_BYTES)):
            size += len(chunk)
    return min(size, limit + 1)

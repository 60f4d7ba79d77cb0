"""Opens a COCO file by the suffix of its name: JSON, or parquet for `.parquet`; local or remote."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mal_train.core.coco.json_reader import MAX_VALUE_CHARS, JsonMemberReader
from mal_train.core.coco.parquet_reader import ParquetDataset, ParquetMemberReader
from mal_train.core.coco.parquet_schema import is_parquet
from mal_train.core.errors import BadDataset
from mal_train.core.storage.addresses import Location
from mal_train.core.storage.reading import local_copy


class MemberReader(Protocol):
    """Reader of the members of a COCO file; a single pass."""

    def members(self) -> Iterator[tuple[str, Any]]:
        """Yields (name, value) in file order; the value of a list is an iterator over its rows."""
        ...

    def sha256(self) -> str:
        """Returns 64 hex digits that identify the content. Call it after the last member."""
        ...


def open_members(path: Location, max_value_chars: int = MAX_VALUE_CHARS) -> MemberReader:
    """Opens a COCO file.

    Args:
        path: a local file; for parquet also an address, or a folder of parts.
        max_value_chars: maximum length of a single JSON value, for example one row.

    Raises:
        BadDataset: the file is unusable; for JSON only when it is read.
        ConfigError: parquet, and pyarrow is not installed.
    """
    return ParquetMemberReader(path) if is_parquet(path) else JsonMemberReader(Path(path), max_value_chars)


def content_sha256(path: Location) -> str:
    """Returns 64 hex digits that identify the content of a COCO file: of its bytes, or for parquet of its footers.

    Raises:
        BadDataset: the file cannot be read.
    """
    if is_parquet(path):
        return ParquetDataset(path).sha256
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadDataset(f"{path}: cannot be read ({error.strerror}); give the path of a COCO JSON file") from error


@contextmanager
def annotation_file(location: Location) -> Iterator[Location]:
    """Yields where a COCO file can be read several times: a local copy of remote JSON; parquet is read in place.

    Raises:
        StorageError, StoreUnreachable, ConfigError, OutputError: as `local_copy`.
    """
    if is_parquet(location):
        yield location
        return
    with local_copy(location) as path:
        yield path

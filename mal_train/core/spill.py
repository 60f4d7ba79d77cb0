"""Sorts rows of text that need not fit into memory: buckets of neighboring keys in an unnamed temporary file."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import BinaryIO, Final, Self

from mal_train.core.errors import OutputError

MEMORY_BYTES: Final = 64 << 20
"""Text that is kept in memory before any is written to the file."""

_SMALLER: Final = 64
"""Factor between the keys of a bucket and of those into which it is divided."""
_ROW_OVERHEAD: Final = 150
"""Bytes of the Python objects of one row."""

Row = tuple[int, int, str]
"""Key, position and text of one row."""


class Spill:
    """Rows by key, up to `MEMORY_BYTES` in memory and the rest in the folder for temporary files. A context manager.

    The file has no name, so that nothing remains of a killed process. Reading holds one bucket in memory at a time; one
    that is too large for `MEMORY_BYTES` is first sorted into smaller buckets.

    Args:
        keys_per_bucket: number of neighboring keys whose rows are read back together.
    """

    def __init__(self, keys_per_bucket: int) -> None:
        self._keys_per_bucket = keys_per_bucket
        self._buckets: dict[int, list[Row]] = {}
        self._bytes = 0
        self._segments: dict[int, list[tuple[int, int]]] = {}
        self._file: BinaryIO | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, key: int, position: int, text: str) -> None:
        """Adds a row. Its text must be ASCII without line breaks, as `json.dumps` writes it.

        Raises:
            OutputError: the temporary file cannot be written.
        """
        self._buckets.setdefault(key // self._keys_per_bucket, []).append((key, position, text))
        self._bytes += len(text) + _ROW_OVERHEAD
        if self._bytes > MEMORY_BYTES:
            self._write()

    def sorted(self) -> Iterator[Row]:
        """Yields all rows, by key and then by position. Call it once, after the last row was added.

        Raises:
            OutputError: the temporary file cannot be read.
        """
        for bucket in sorted(self._buckets.keys() | self._segments.keys()):
            size = sum(length for _, length in self._segments.get(bucket, ()))
            if size > MEMORY_BYTES and self._keys_per_bucket > 1:
                yield from self._divided(bucket)
            else:
                yield from sorted(self._rows(bucket), key=lambda row: row[:2])

    def _divided(self, bucket: int) -> Iterator[Row]:
        """Yields the rows of a bucket by another spill with smaller ones."""
        with Spill(max(1, self._keys_per_bucket // _SMALLER)) as smaller:
            for row in self._rows(bucket):
                smaller.add(*row)
            yield from smaller.sorted()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed by the stack
            for bucket, rows in self._buckets.items():
                data = "".join(f"{key} {position} {text}\n" for key, position, text in rows).encode("ascii")
                self._segments.setdefault(bucket, []).append((self._file.tell(), len(data)))
                self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise _error(error) from error
        self._buckets.clear()
        self._bytes = 0

    def _rows(self, bucket: int) -> Iterator[Row]:
        """Yields the rows of a bucket in the order in which they were added; forgets those in memory."""
        for offset, length in self._segments.get(bucket, ()):
            assert self._file is not None
            try:
                self._file.seek(offset)
                lines = self._file.read(length).decode("ascii").splitlines()
            except OSError as error:
                raise _error(error) from error
            for line in lines:
                key, position, text = line.split(" ", 2)
                yield int(key), int(position), text
        yield from self._buckets.pop(bucket, [])


def _error(error: OSError) -> OutputError:
    return OutputError(
        f"{tempfile.gettempdir()}: temporary file not written ({error.strerror or error}); free some space, or set "
        "TMPDIR to a folder that has as much as the annotations take as JSON"
    )

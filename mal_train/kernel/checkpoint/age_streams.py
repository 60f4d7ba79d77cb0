"""Streams that the age library reads from and writes to, which keep the errors that it would make text of.

The library is `pyrage`; whoever calls it looks into `KeptError` for what really happened.
"""

import hashlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import BinaryIO, Protocol


class Sink(Protocol):
    """Takes content in order. What it gathers may be used only after `SealedFile.read_into` has returned."""

    def write(self, part: bytes, /) -> object:
        """Take the next bytes."""


class KeptError:
    """Remembers what was raised within `with kept:`. The library flattens errors of its streams into text."""

    error: BaseException | None = None

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.error = self.error or error


class PartsReader:
    """A readable stream over buffers, in the small steps in which the library reads."""

    def __init__(self, parts: Iterable[memoryview], kept: KeptError) -> None:
        self._parts: Iterator[memoryview] = iter(parts)
        self._kept = kept
        self._part = memoryview(b"")
        self._at = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        while self._at == len(self._part):
            with self._kept:
                part = next(self._parts, None)
            if part is None:
                return b""
            self._part, self._at = part, 0
        piece = bytes(self._part[self._at : self._at + size])
        self._at += len(piece)
        return piece


class KeepingFile:
    """A file for the library to write, whose errors are remembered."""

    def __init__(self, file: BinaryIO, kept: KeptError) -> None:
        self._file = file
        self._kept = kept

    def write(self, data: bytes) -> int:
        """As the file does."""
        with self._kept:
            return self._file.write(data)

    def flush(self) -> None:
        """Left to `replacing`, which syncs once."""


class HashedFile:
    """A file for the library to read, whose bytes are hashed and whose errors are remembered.

    The library reads and writes 8 KiB at a time: what happens here happens a hundred thousand times a gigabyte.
    """

    def __init__(self, file: BinaryIO, digest: "hashlib._Hash", kept: KeptError) -> None:
        self._read, self._update, self._kept = file.read, digest.update, kept

    def read(self, size: int) -> bytes:
        """As the file does."""
        try:
            part = self._read(size)
        # Whatever it is: the library would make text of it.
        except BaseException as error:
            self._kept.error = self._kept.error or error
            raise
        self._update(part)
        return part


class CountingSink:
    """A writable stream that counts: every byte that arrives belongs to a chunk that has verified."""

    def __init__(self, sink: Sink, kept: KeptError) -> None:
        self._sink = sink
        self._kept = kept
        self.count = 0

    def write(self, part: bytes) -> int:
        """Pass on."""
        try:
            self._sink.write(part)
        # Whatever it is: the library would make text of it.
        except BaseException as error:
            self._kept.error = self._kept.error or error
            raise
        size = len(part)
        self.count += size
        return size

    def flush(self) -> None:
        """Nothing is held back."""

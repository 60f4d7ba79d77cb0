"""Adapts files and buffers to the streams of the age library, `pyrage`, and preserves their exceptions.

The library turns an exception of a stream into text. The adapters record the exception in a `StreamError`, so that the
caller can raise the original. They are called once for every 8 KiB: some hundred thousand times for a gigabyte.
"""

import hashlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import BinaryIO, Protocol


class Sink(Protocol):
    """Receives content in order. Nothing of it may be used before `EncryptedFile.read_into` has returned."""

    def write(self, data: bytes, /) -> object:
        """Receives the next bytes."""


class StreamError:
    """Records the first exception that is raised within `with stream_error:`."""

    error: BaseException | None = None

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.error = self.error or error


class BufferReader:
    """A readable stream over a sequence of buffers."""

    def __init__(self, buffers: Iterable[memoryview], stream_error: StreamError) -> None:
        self._buffers: Iterator[memoryview] = iter(buffers)
        self._stream_error = stream_error
        self._buffer = memoryview(b"")
        self._position = 0

    def read(self, size: int) -> bytes:
        """Returns up to `size` bytes; none at the end."""
        while self._position == len(self._buffer):
            with self._stream_error:
                buffer = next(self._buffers, None)
            if buffer is None:
                return b""
            self._buffer, self._position = buffer, 0
        data = bytes(self._buffer[self._position : self._position + size])
        self._position += len(data)
        return data


class FileWriter:
    """A writable stream over a file."""

    def __init__(self, file: BinaryIO, stream_error: StreamError) -> None:
        self._file = file
        self._stream_error = stream_error

    def write(self, data: bytes) -> int:
        """Writes to the file; returns the number of bytes written."""
        with self._stream_error:
            return self._file.write(data)

    def flush(self) -> None:
        """Does nothing: `atomic_write` flushes and syncs once."""


class HashingReader:
    """A readable stream over a file that hashes every byte read."""

    def __init__(self, file: BinaryIO, digest: "hashlib._Hash", stream_error: StreamError) -> None:
        self._read, self._update, self._stream_error = file.read, digest.update, stream_error

    def read(self, size: int) -> bytes:
        """Reads up to `size` bytes, and adds them to the hash."""
        try:
            data = self._read(size)
        # Record every exception: the library turns it into text.
        except BaseException as error:
            self._stream_error.error = self._stream_error.error or error
            raise
        self._update(data)
        return data


class CountingWriter:
    """A writable stream over a sink that counts bytes. The library writes only chunks that it has verified."""

    def __init__(self, sink: Sink, stream_error: StreamError) -> None:
        self._sink = sink
        self._stream_error = stream_error
        self.count = 0

    def write(self, data: bytes) -> int:
        """Writes to the sink; returns the number of bytes written."""
        try:
            self._sink.write(data)
        # Record every exception: the library turns it into text.
        except BaseException as error:
            self._stream_error.error = self._stream_error.error or error
            raise
        size = len(data)
        self.count += size
        return size

    def flush(self) -> None:
        """Does nothing: no byte is held back."""

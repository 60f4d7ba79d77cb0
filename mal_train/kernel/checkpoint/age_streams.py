"""Adapts files and buffers to the streams of the age library, `pyrage`, and preserves their exceptions.

The library turns an exception of a stream into text. The adapters record the exception in a `StreamError`, so that the
caller can raise the original. They are called once for every 8 KiB: some hundred thousand times for a gigabyte.
"""

import hashlib
import itertools
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO, Protocol

BLOCK = 8 << 20
"""Bytes that `hashed_blocks` reads and hashes at a time. Two blocks are in memory. The thread takes turns with the
decryption, which leaves the interpreter to others every 5 ms: with smaller blocks it would mostly wait for its turn."""


class Sink(Protocol):
    """Receives content in order. Nothing of it may be used before `EncryptedFile.read_into` has returned."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Receives the next bytes; a view is valid until this returns."""


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


def hashed_blocks(file: BinaryIO, digest: "hashlib._Hash") -> Generator[memoryview, None, None]:
    """Yields a file in blocks, all of which are hashed. A thread reads and hashes the next block meanwhile.

    A block may be used until the next one is requested: its memory is used again, since first touches of new memory
    take as long as hashing.
    """

    def fill(buffer: memoryview) -> memoryview:
        block = buffer[: file.readinto(buffer)]  # type: ignore[attr-defined]  # BinaryIO lacks `readinto`
        digest.update(block)
        return block

    buffers = itertools.cycle([memoryview(bytearray(BLOCK)), memoryview(bytearray(BLOCK))])
    with ThreadPoolExecutor(1, "checkpoint-hash") as thread:
        ahead = thread.submit(fill, next(buffers))
        while block := ahead.result():
            ahead = thread.submit(fill, next(buffers))
            yield block


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

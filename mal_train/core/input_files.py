"""Reads the files of users and of untrusted text: below one folder, regular, of limited size, in any encoding."""

import errno
import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO, Final, TextIO, cast

from mal_train.core.locked_file import NON_BLOCKING, O_BINARY

GZIP_MAGIC: Final = b"\x1f\x8b"
"""First bytes of a gzip file."""
GZIP_SUFFIX: Final = ".gz"
_MAGIC_BYTES: Final = 4


def cause_of(error: Exception) -> str:
    """Returns why a file cannot be read, without number and path, which the message of an OSError repeats.

    >>> cause_of(FileNotFoundError(2, "No such file or directory", "a.csv"))
    'No such file or directory'
    """
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def without_gzip(name: str) -> str:
    """Returns the name of a file without the suffix of gzip.

    >>> without_gzip("boxes.csv.GZ"), without_gzip("boxes.csv")
    ('boxes.csv', 'boxes.csv')
    """
    return name[: -len(GZIP_SUFFIX)] if PurePath(name).suffix.lower() == GZIP_SUFFIX else name


def resolve_inside(folder: Path, name: str) -> Path | None:
    """Returns the real path of `name` relative to a folder; None if it leads outside.

    Neither "..", an absolute name nor a symbolic link leads outside; a link to a place inside the folder is followed.
    The file may be missing.
    """
    root = os.path.realpath(folder)
    try:
        resolved = os.path.realpath(os.path.join(root, name))
    # ValueError: a NUL character; OSError, RuntimeError: a loop of links.
    except (OSError, ValueError, RuntimeError):
        return None
    # As strings: `Path.is_relative_to` takes longer than all calls of the file system here.
    is_inside = resolved == root or os.path.normcase(resolved).startswith(os.path.normcase(os.path.join(root, "")))
    return Path(resolved) if is_inside else None


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of a regular file: at most `max_bytes` + 1, so that one byte too many shows a larger file.

    Raises:
        OSError: the file cannot be opened, or is a folder, pipe or device, which may have no end.
        ValueError: the path has a NUL character.
    """
    with open_regular(path) as file:
        # Of the stated size first: `read` alone would grow its buffer step by step.
        return file.read(max(0, min(os.fstat(file.fileno()).st_size, max_bytes)) + 1)


def open_regular(path: Path, buffer_bytes: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    """Opens a regular file for reading.

    Raises:
        OSError: the file cannot be opened, or is a folder, pipe or device.
        ValueError: the path has a NUL character.
    """
    # Non-blocking: opening a named pipe would otherwise block forever.
    descriptor = os.open(path, os.O_RDONLY | NON_BLOCKING | O_BINARY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.BufferedReader(io.FileIO(descriptor), buffer_bytes)


@contextmanager
def open_unzipped(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a regular file for reading; a gzip file, which its first bytes show, is read decompressed.

    Raises:
        OSError: as `open_regular`; also while reading a damaged gzip file.
        ValueError: the path has a NUL character.
    """
    with open_regular(path) as file:
        if file.peek(len(GZIP_MAGIC))[: len(GZIP_MAGIC)] != GZIP_MAGIC:
            yield file
            return
        with io.BufferedReader(_Unzipped(file)) as unzipped:
            yield cast(io.BufferedReader, unzipped)


@contextmanager
def open_text(path: Path, encoding: str = "utf-8") -> Iterator[TextIO]:
    """Opens a text file, also a gzip file, for reading line by line; line ends are kept.

    Args:
        path: the file.
        encoding: as for `decode_text`.

    Raises:
        OSError: as `open_unzipped`.
        UnicodeError: while reading; the text is not in this encoding.
        ValueError: the path has a NUL character.
    """
    with open_unzipped(path) as file:
        first = file.peek(_MAGIC_BYTES)[:_MAGIC_BYTES]
        with io.TextIOWrapper(file, text_encoding(first, encoding), newline="") as text:
            yield text


def read_text(path: Path, max_bytes: int, encoding: str = "utf-8") -> str:
    """Returns the text of a file, also of a gzip file, with its line ends.

    Args:
        path: the file.
        max_bytes: size limit of the text, decompressed.
        encoding: as for `decode_text`.

    Raises:
        OSError: as `open_unzipped`; EFBIG for more than `max_bytes`.
        UnicodeError: the text is not in this encoding.
        ValueError: the path has a NUL character.
    """
    return decode_text(read_unzipped(path, max_bytes), encoding)


def read_unzipped(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of a file, decompressed. Raises as `read_text`, but for the encoding."""
    with open_unzipped(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", str(path))
    return content


def decode_text(data: bytes, encoding: str = "utf-8") -> str:
    r"""Returns the text of a file. Every text file that users bring is decoded by this rule.

    A byte order mark decides: UTF-8, UTF-16 or UTF-32; it is no part of the text. UTF-16 and UTF-32 without one are
    known by their NUL bytes.

    Args:
        data: the bytes.
        encoding: name of the encoding of all other text.

    Raises:
        UnicodeError: the text is not in this encoding.
        LookupError: no such encoding.

    >>> decode_text(b"\xef\xbb\xbfbed"), decode_text("bed".encode("utf-16")), decode_text(b"l\xe6gte", "latin-1")
    ('bed', 'bed', 'lægte')
    """
    return data.decode(text_encoding(data[:_MAGIC_BYTES], encoding))


def split_lines(text: str) -> list[str]:
    r"""Returns the lines of a text without their ends, which are those of Unix, Windows and old Macs alone.

    >>> split_lines("a\r\nb\rc\u2028d\n")
    ['a', 'b', 'c\u2028d', '']
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def text_encoding(first: bytes, encoding: str) -> str:
    """Returns the encoding that the first bytes of a text show, else `encoding`."""
    detected = json.detect_encoding(first)
    return encoding if detected == "utf-8" else detected


class _Unzipped(io.RawIOBase):
    """The content of a gzip file; damage is an OSError, as that of any other file."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = gzip.GzipFile(fileobj=file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            return self._file.readinto(buffer)
        except (EOFError, zlib.error) as error:
            raise OSError(errno.EIO, f"damaged gzip file: {error}") from None

"""Reads files by address: local paths, objects in stores, files on web servers.

    read_bytes("s3://bucket/a.jpg", max_bytes)      the content, in memory
    local_copy("s3://bucket/boxes.json")            a path, for files that are read more than once
    open_random("s3://bucket/boxes.parquet")        a seekable file that reads ranges

Transient errors are repeated: `retry.ATTEMPTS` attempts, 7.5 s of pauses in all. Every other error is raised at once,
as a `StorageError` with its reason.
"""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from mal_train.core.atomic_io import TEMPORARY_SUFFIX, remove_stale_temporaries
from mal_train.core.errors import MalError, OutputError, StorageError
from mal_train.core.input_files import open_regular, read_limited
from mal_train.core.locked_file import try_lock
from mal_train.core.storage.addresses import OBJECT_SCHEMES, Location, base_name, is_remote, redact, scheme_of
from mal_train.core.storage.disk_space import check_space, disk_errors
from mal_train.core.storage.hosts import AllowedHosts
from mal_train.core.storage.object_store import AzureStore, GcsStore, ObjectInfo, S3Store, Store
from mal_train.core.storage.retry import with_retries
from mal_train.core.storage.store_errors import too_large
from mal_train.core.storage.web_store import WebStore

BLOCK_BYTES: Final = 16 * 1024 * 1024
"""Bytes of one request of `local_copy`."""
MAX_COPY_BYTES: Final = 1 << 40
"""Default size limit of `local_copy`; the free space of the disk is checked as well."""

MAX_SHOWN_NAME: Final = 100
"""Bytes of a file name that its temporary copy shows."""

_STORES: Final[dict[str, Store]] = {"s3": S3Store(), "gs": GcsStore(), "az": AzureStore(), "abfs": AzureStore()}


def store_of(address: str, hosts: AllowedHosts | None = None) -> Store:
    """Returns the store of a remote address; `hosts` limits web addresses, see `WebStore`."""
    return _STORES.get(scheme_of(address)) or WebStore(hosts)


def read_bytes(
    address: Location, max_bytes: int, *, hosts: AllowedHosts | None = None, attempts: int | None = None
) -> bytes:
    """Returns the content of a file of at most `max_bytes`.

    The size is checked before the download; one that is not stated is limited while reading. The bytes are those of one
    version of the object.

    Args:
        address: path or address.
        max_bytes: size limit.
        hosts: web hosts that may be contacted; None trusts the address, as one that the user gave.
        attempts: number of attempts; None: that of the store.

    Raises:
        StorageError: see `StorageError.reason`.
        StoreUnreachable: the store cannot be reached, or fails on every attempt.
        ConfigError: the extra `remote` is not installed.
        OSError: a local file cannot be read.
    """
    if not is_remote(address):
        content = read_limited(Path(address), max_bytes)
        if len(content) > max_bytes:
            raise too_large(str(address), f"more than {max_bytes} bytes", max_bytes)
        return content
    text = str(address)
    store = store_of(text, hosts)
    return with_retries(lambda: store.read(text, max_bytes), redact(text), attempts=attempts or store.attempts)


@contextmanager
def local_copy(address: Location, *, max_bytes: int = MAX_COPY_BYTES) -> Iterator[Path]:
    """Yields a path with the content of a file: the path itself, or a temporary download.

    A download is readable by this user alone and removed at the end of the block. It lies in the folder of temporary
    files (TMPDIR). One that a killed process leaves behind is removed by the next download of the same user. Errors of
    this project that the block raises name the address in place of the download.

    Args:
        address: path or address.
        max_bytes: size limit of a download.

    Raises:
        StorageError, StoreUnreachable, ConfigError: as `read_bytes`.
        OutputError: the disk has not enough space.
    """
    if not is_remote(address):
        yield Path(address)
        return
    text = str(address)
    with temporary_file(base_name(text)) as (path, file):
        _download(text, file, max_bytes)
        with named_as(path, text):
            yield path


@contextmanager
def named_as(path: Path, address: str) -> Iterator[None]:
    """Names the address in place of the local path in errors of this project that the block raises."""
    try:
        yield
    except MalError as error:
        error.args = tuple(
            value.replace(str(path), redact(address)) if isinstance(value, str) else value for value in error.args
        )
        raise


@contextmanager
def temporary_file(name: str) -> Iterator[tuple[Path, BinaryIO]]:
    """Yields path and file of a new temporary file of this user, which is removed at the end of the block.

    It is locked meanwhile, so that the next call can tell the file of a killed process and remove it.

    Raises:
        OutputError: it cannot be created.
    """
    shown = name.encode(errors="ignore")[:MAX_SHOWN_NAME].decode(errors="ignore")
    with _creating():
        remove_stale_temporaries(Path(tempfile.gettempdir()))
        descriptor, text = tempfile.mkstemp(prefix=f".{shown}.", suffix=TEMPORARY_SUFFIX)
    path = Path(text)
    file = os.fdopen(descriptor, "w+b")
    try:
        with suppress(OSError):  # a file system without locks, where nothing is removed as stale
            try_lock(descriptor)
        yield path, file
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # of a full disk, which the block has met
            file.close()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a new folder of this user, which is removed at the end of the block.

    Raises:
        OutputError: it cannot be created.
    """
    with _creating():
        folder = tempfile.TemporaryDirectory(prefix="mal-")
    with folder as text:
        yield Path(text)


@contextmanager
def _creating() -> Iterator[None]:
    """Turns the errors of creating a temporary file into OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{os.environ.get('TMPDIR') or 'folder of temporary files'}: cannot be written ({error.strerror}); set "
            "TMPDIR to a folder that can"
        ) from None


def open_random(address: Location) -> BinaryIO:
    """Opens a file that is read at any position, for formats such as parquet.

    Every read of a remote file is one request for that range, without a cache: wrap the file in `io.BufferedReader` for
    small reads. All reads return bytes of the version that was opened; another one raises CHANGED.

    Raises:
        StorageError: as `read_bytes`; from reads as well. FAILED for a web server that states no size or version, or
            sends no ranges.
        OSError: a local file cannot be opened.
    """
    if not is_remote(address):
        return open_regular(Path(address))
    return RemoteFile(str(address))  # type: ignore[return-value]  # BinaryIO is no base class of io's classes


class RemoteFile(io.RawIOBase):
    """A remote file that reads the ranges that it is asked for; see `open_random`. Not safe in threads.

    Args:
        address: remote address.

    Attributes:
        name: redacted address.
        size: in bytes.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self.name = redact(address)
        self._address = address
        self._store = store_of(address)
        self._info = info_of(address)
        if self._info.size is None:
            raise StorageError(f"{self.name}: the server states no size; download the file", "FAILED")
        if not self._info.version:
            # Ranges of two versions could be mixed.
            raise StorageError(f"{self.name}: the server states no ETag and no date; download the file", "FAILED")
        self.size = self._info.size
        self._position = 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position and returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Returns the next `size` bytes, or all that are left, by one request."""
        end = self.size if size is None or size < 0 else min(self.size, self._position + size)
        start = self._position
        if start >= end:
            return b""
        data = with_retries(
            lambda: self._store.read_range(self._address, start, end, self._info),
            self.name,
            attempts=self._store.attempts,
        )
        self._position = end
        return data

    def readall(self) -> bytes:
        """Returns all bytes that are left."""
        return self.read()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills a buffer; returns the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def info_of(address: str, hosts: AllowedHosts | None = None) -> ObjectInfo:
    """Returns size and version of a remote file. Raises as `read_bytes`."""
    store = store_of(address, hosts)
    return with_retries(lambda: store.info(address), redact(address), attempts=store.attempts)


def _download(address: str, file: BinaryIO, max_bytes: int) -> None:
    with disk_errors(address):
        if scheme_of(address) in OBJECT_SCHEMES:
            _download_blocks(address, file, max_bytes)
        else:
            with_retries(lambda: WebStore().copy(address, file, max_bytes), redact(address))
        file.flush()


def _download_blocks(address: str, file: BinaryIO, max_bytes: int) -> None:
    store, info = store_of(address), info_of(address)
    size = info.size or 0
    if size > max_bytes:
        raise too_large(address, f"{size} bytes", max_bytes)
    check_space(address, size)
    for start in range(0, size, BLOCK_BYTES):
        read_block = partial(store.read_range, address, start, min(start + BLOCK_BYTES, size), info)
        file.write(with_retries(read_block, redact(address), attempts=store.attempts))

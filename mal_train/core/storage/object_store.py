"""Object stores by fsspec: Amazon S3, Google Cloud Storage, Azure Blob Storage. Needs the extra `remote`.

Each method is one attempt. Credentials come from the places where the library of the store looks for them; this project
has no setting for them. An object is read in one request, or in several that name its version, so that an object that
is replaced meanwhile is never mixed with its successor.
"""

import importlib
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, NoReturn

from mal_train.core.errors import ConfigError, StorageError
from mal_train.core.storage.addresses import redact, scheme_of, split_object
from mal_train.core.storage.retry import (
    ATTEMPTS,
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    Transient,
    attempt_timeout_s,
    with_retries,
)
from mal_train.core.storage.store_errors import changed, missing, too_large, translate

PIP_LINE: Final = "pip install 'mask-auto-labeler[remote]'"
MAX_CONNECTIONS: Final = 64
"""Connections to one store; read-ahead uses fewer."""

_filesystems: dict[tuple[int, str], Any] = {}
_filesystems_lock = threading.Lock()


def _renew_lock() -> None:
    """Replaces a lock that another thread of the forked process may have held."""
    global _filesystems_lock  # noqa: PLW0603 (a lock cannot be reset)
    _filesystems_lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


class ObjectInfo(NamedTuple):
    """Size of an object in bytes, None if the store does not state it, and its version; "" if there is none."""

    size: int | None
    version: str


class Store(ABC):
    """Store of objects; every method is one attempt and raises `Transient` for an error that may pass.

    Attributes:
        attempts: number of attempts that the caller makes; 1 where the library itself repeats requests.
    """

    attempts: ClassVar[int] = ATTEMPTS

    @abstractmethod
    def info(self, address: str) -> ObjectInfo:
        """Returns size and version of an object."""

    @abstractmethod
    def read_range(self, address: str, start: int, end: int, info: ObjectInfo) -> bytes:
        """Returns the bytes from `start` to `end` (exclusive) of the version that `info` names."""

    def read(self, address: str, max_bytes: int) -> bytes:
        """Returns an object, whose size is checked before its bytes are requested."""
        info = self.info(address)
        assert info.size is not None
        if info.size > max_bytes:
            raise too_large(address, f"{info.size} bytes", max_bytes)
        return self.read_range(address, 0, info.size, info)

    @abstractmethod
    def upload(self, source: Path, address: str) -> None:
        """Writes an object from a file: the whole object or nothing."""

    @abstractmethod
    def check_writable(self, address: str) -> None:
        """Checks what can be checked of a later `upload` without leaving an object."""

    @abstractmethod
    def remove(self, address: str) -> None:
        """Deletes an object; a missing one is no error."""

    @abstractmethod
    def names(self, prefix: str) -> Iterator[str]:
        """Yields the names of the objects below a prefix, relative to it, in alphabetical order."""


class _FsspecStore(Store):
    """Store that fsspec reads."""

    protocol: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    def filesystem(self, address: str) -> Any:
        """Returns the file system of this process: sessions do not survive a fork."""
        key = os.getpid(), _account(address)
        with _filesystems_lock:
            if key not in _filesystems:
                _filesystems[key] = self._connect(address)
            return _filesystems[key]

    def _connect(self, address: str) -> Any:
        fsspec = load_module("fsspec", address)
        # It prints the traceback of every error that it raises; ours name the address and the remedy.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        try:
            kind = fsspec.get_filesystem_class(self.protocol)
        except ImportError as error:
            refuse_without_extra(address, error)
        with translated(address):
            given = kind._get_kwargs_from_urls(address) if "@" in _account(address) else {}
            # Neither shared per thread, as fsspec would, nor with listings that may be stale.
            return kind(**given, **self.options, skip_instance_cache=True, use_listings_cache=False)

    def info(self, address: str) -> ObjectInfo:
        """Returns size and version of an object."""
        with translated(address):
            row = self.filesystem(address).info(_path(address), timeout=attempt_timeout_s())
        if row.get("type") == "directory" or row.get("size") is None:
            raise missing(address)
        return ObjectInfo(int(row["size"]), str(row.get("generation") or row.get("etag") or row.get("ETag") or ""))

    def upload(self, source: Path, address: str) -> None:
        """Writes an object from a file; the store shows it when its last byte has arrived."""
        limit_s = attempt_timeout_s(source.stat().st_size)
        with translated(address):
            self.filesystem(address).put_file(str(source), _path(address), timeout=limit_s)

    def check_writable(self, address: str) -> None:
        """Checks that the bucket exists and that the credentials may see it; writing itself is not tried."""
        bucket, _ = split_object(address)
        with translated(address):
            self.filesystem(address).info(bucket, timeout=attempt_timeout_s())

    def remove(self, address: str) -> None:
        """Deletes an object; a missing one is no error."""
        try:
            with translated(address):
                self.filesystem(address).rm_file(_path(address), timeout=attempt_timeout_s())
        except StorageError as error:
            if error.reason != "NOT_FOUND":
                raise

    def names(self, prefix: str) -> Iterator[str]:
        """Yields the names of the objects below a prefix; lists 1000 or more in a request."""
        base = f"{_path(prefix).rstrip('/')}/"
        with translated(prefix):
            found = self.filesystem(prefix).find(base)
        # Of an object in place of a prefix, fsspec finds the object itself.
        yield from sorted(path.removeprefix(base) for path in found if path.startswith(base))


class S3Store(_FsspecStore):
    """Amazon S3, and stores that speak its protocol (AWS_ENDPOINT_URL)."""

    protocol = "s3"
    options: ClassVar[dict[str, Any]] = {
        "config_kwargs": {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": MAX_CONNECTIONS,
            "retries": {"total_max_attempts": 1},
        }
    }

    def _connect(self, address: str) -> Any:
        filesystem = super()._connect(address)
        filesystem.retries = 1  # ours are the only ones
        return filesystem

    def read(self, address: str, max_bytes: int) -> bytes:
        """Returns an object by one request; its size is checked before its bytes are read."""
        return self._get(address, max_bytes, {})

    def read_range(self, address: str, start: int, end: int, info: ObjectInfo) -> bytes:
        """Returns a range of the version whose ETag is known; the store refuses another version."""
        if start >= end:
            return b""
        condition = {"IfMatch": info.version} if info.version else {}
        data = self._get(address, end - start, {"Range": f"bytes={start}-{end - 1}", **condition})
        if len(data) != end - start:
            raise changed(address)
        return data

    def check_writable(self, address: str) -> None:
        """Checks the permission to write: begins an upload and ends it without an object."""
        bucket, key = split_object(address)
        place = {"Bucket": bucket, "Key": key, "timeout": attempt_timeout_s()}
        filesystem = self.filesystem(address)
        with translated(address):
            upload = filesystem.call_s3("create_multipart_upload", **place)

        def end() -> None:
            with translated(address):
                filesystem.call_s3("abort_multipart_upload", UploadId=upload["UploadId"], **place)

        # By itself: another attempt of the whole check would begin another upload, and leave this one.
        with_retries(end, redact(address))

    def _get(self, address: str, max_bytes: int, options: dict[str, str]) -> bytes:
        bucket, key = split_object(address)
        filesystem, asyn = self.filesystem(address), load_module("fsspec.asyn", address)
        with translated(address):
            response = filesystem.call_s3("get_object", Bucket=bucket, Key=key, timeout=attempt_timeout_s(), **options)
            body, size = response["Body"], int(response["ContentLength"])
            try:
                if size > max_bytes:
                    raise too_large(address, f"{size} bytes", max_bytes)
                data: bytes = asyn.sync(filesystem.loop, body.read, timeout=attempt_timeout_s(size))
            finally:
                filesystem.loop.call_soon_threadsafe(body.close)
        if len(data) != size:
            raise Transient("incomplete")
        return data


class GcsStore(_FsspecStore):
    """Google Cloud Storage; gcsfs repeats requests itself, up to six times."""

    protocol = "gs"
    options: ClassVar[dict[str, Any]] = {"access": "read_write"}
    attempts = 1

    def read_range(self, address: str, start: int, end: int, info: ObjectInfo) -> bytes:
        """Returns a range of one generation of an object."""
        if start >= end:
            return b""
        try:
            with translated(address):
                data: bytes = self.filesystem(address).cat_file(
                    *(_path(address), start, end),
                    concurrency=1,
                    generation=info.version or None,
                    timeout=attempt_timeout_s(end - start),
                )
        except StorageError as error:
            # A generation that was replaced is gone.
            raise changed(address) if info.version and error.reason == "NOT_FOUND" else error from None
        if len(data) != end - start:
            raise changed(address)
        return data


class AzureStore(_FsspecStore):
    """Azure Blob Storage; its library repeats requests itself, up to three times."""

    protocol = "abfs"
    attempts = 1

    def read_range(self, address: str, start: int, end: int, info: ObjectInfo) -> bytes:
        """Returns a range of a blob; adlfs has no conditional read, so the ETag is compared afterwards."""
        if start >= end:
            return b""
        with translated(address):
            data: bytes = self.filesystem(address).cat_file(
                *(_path(address), start, end), timeout=attempt_timeout_s(end - start)
            )
        if len(data) != end - start or self.info(address) != info:
            raise changed(address)
        return data


def forget_connections() -> None:
    """Drops the connections of this process; the next request reads environment and configuration files again."""
    with _filesystems_lock:
        _filesystems.clear()


@contextmanager
def translated(address: str) -> Iterator[None]:
    """Translates every error of a library in the block; see `translate`."""
    try:
        yield
    except (Transient, StorageError, ConfigError):
        raise
    # The libraries raise errors of many kinds, some of their own; each becomes one of ours.
    except Exception as error:
        raise translate(error, address) from None


def load_module(name: str, address: str) -> Any:
    """Returns a module of the extra `remote`, which `address` needs. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        refuse_without_extra(address, error)


def refuse_without_extra(address: str, error: ImportError) -> NoReturn:
    """Raises the error that names the extra."""
    raise ConfigError(
        f"{redact(address)}: needs the extra 'remote' ({error.name or 'a package'} is missing); run: {PIP_LINE}"
    ) from None


def _path(address: str) -> str:
    """Returns BUCKET/KEY."""
    bucket, key = split_object(address)
    return f"{bucket.partition('@')[0]}/{key}"


def _account(address: str) -> str:
    """Returns the scheme of an address, with the account where abfs:// names one."""
    bucket, _ = split_object(address)
    return f"{scheme_of(address)}://{bucket}" if "@" in bucket else scheme_of(address)

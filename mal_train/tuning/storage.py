"""Opens Optuna's storage of a study: a database, a journal file, or a server of Optuna.

A journal file is shared by processes of one machine or over a network file system; a database or Optuna's server by
machines. Errors name the storage without its credentials.
"""

import contextlib
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import optuna
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, SQLAlchemyError

from mal_train.config.tune import redacted_url, without_credentials
from mal_train.core.atomic_io import drop_partial_line
from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.proxies import server_hint
from mal_train.core.secrets import is_secret_reference, read_secret

CONNECT_TIMEOUT_S = 20
"""Seconds until a database or a server that does not answer, or a locked file, is an error."""
LOCK_GRACE_S = 10
"""Seconds after which a journal file's lock is taken from a process that was killed; an entry takes milliseconds."""
CREATION_PAUSES_S = (0.2, 0.5, 1.0, 2.0)
"""Pauses before further attempts to open a database whose tables another process is creating."""
SCHEMES = "sqlite:///FILE, journal:///FILE, postgresql://…, mysql://…, grpc://HOST:PORT, env:NAME or file:PATH"


class StudyStorageError(OutputError):
    """The storage of a study that is unreachable, locked by another process, or full. Exit code 4."""


def storage_url(setting: str | None, folder: Path) -> str:
    """Returns the address that `tune.storage` gives; by default a SQLite file in the output folder.

    Raises:
        ConfigError: the variable or file that it refers to is missing.
    """
    if setting is None:
        return f"sqlite:///{folder / 'study.db'}"
    return read_secret(setting, "tune.storage").strip() if is_secret_reference(setting) else setting


def open_storage(url: str) -> BaseStorage:
    """Opens a storage, and creates its file or tables if they are missing.

    Raises:
        ConfigError: the address is malformed, or its driver is not installed.
        StudyStorageError: the storage is unreachable or locked.
    """
    scheme = url.partition("://")[0]
    with storage_errors(url), quiet_optuna():
        if scheme == "journal":
            return JournalStorage(JournalFile(Path(_file_of(url))))
        if scheme == "grpc":
            return _server(url)
        return _database(url)


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Converts the errors of databases and servers to one line without credentials.

    Raises:
        ConfigError: the address is malformed, or its driver is not installed.
        StudyStorageError: the storage is unreachable or locked.
    """
    try:
        yield
    except (ArgumentError, ImportError) as error:
        text = without_credentials(str(error), url)
        raise ConfigError(f"tune.storage: {redacted_url(url)}: {text}; give {SCHEMES}") from None
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, grpc.RpcError) as error:
        raise StudyStorageError(f"tune.storage: {redacted_url(url)}: {_reason(error, url)}") from None


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Suppresses the log of Optuna and its warnings of experimental functions."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _reason(error: BaseException, url: str) -> str:
    """Returns what a library says of its storage, in one line, and what to do."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    cause = getattr(cause, "orig", None) or cause or error
    if isinstance(cause, grpc.RpcError):
        text = str(getattr(cause, "details", lambda: cause)())
    else:
        text = " ".join(str(cause).split())
    if "database is locked" in text:
        return f"locked by another process for {CONNECT_TIMEOUT_S} s; end it, or use a storage for several tuners"
    return f"{without_credentials(text, url) or type(cause).__name__}; check the address, the network and the rights"


def _database(url: str) -> BaseStorage:
    address = make_url(url)
    backend = address.get_backend_name()
    options: dict[str, Any] = {"pool_pre_ping": True}
    if backend == "sqlite":
        options["connect_args"] = {"timeout": CONNECT_TIMEOUT_S}
    elif backend in {"postgresql", "mysql", "mariadb"}:
        options["connect_args"] = {"connect_timeout": CONNECT_TIMEOUT_S}
    for pause_s in CREATION_PAUSES_S:
        try:
            return get_storage(RDBStorage(url, engine_kwargs=options))
        except (DatabaseError, optuna.exceptions.StorageInternalError) as error:
            if not _is_created_by_another(error):
                raise
        time.sleep(pause_s)
    return get_storage(RDBStorage(url, engine_kwargs=options))


def _is_created_by_another(error: BaseException) -> bool:
    """Returns True if another process created a table or its first row after Optuna had looked for it."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    return isinstance(cause, IntegrityError) or "already exists" in str(cause)


def _server(url: str) -> GrpcStorageProxy:
    host, _, port = url.removeprefix("grpc://").rstrip("/").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"tune.storage: {redacted_url(url)}; give the address of Optuna's server as grpc://HOST:PORT")
    storage = GrpcStorageProxy(host=host, port=int(port))
    try:
        storage.wait_server_ready(timeout=CONNECT_TIMEOUT_S)
    except ConnectionError:
        raise StudyStorageError(
            f"tune.storage: {redacted_url(url)}: no answer within {CONNECT_TIMEOUT_S} s; start the server or check the "
            f"address{server_hint(f'{host}:{port}')}"
        ) from None
    return storage


def _file_of(url: str) -> str:
    """Returns the file of an address: relative after three slashes, absolute after four, as in SQLAlchemy."""
    path = url.removeprefix("journal:///")
    if path == url or not path:
        raise ConfigError(f"tune.storage: {redacted_url(url)}; give a journal file as journal:///FILE")
    return path


class JournalFile(JournalFileBackend):
    """Optuna's journal file, whose errors name it.

    A part of a line that a killed process left at its end is removed when the file is opened.

    Raises:
        StudyStorageError: the file cannot be created, read or written, or is no journal.
    """

    def __init__(self, path: Path) -> None:
        # Absolute, because the lock is a link to the file: a link to a relative path would name nothing.
        self._path = path.absolute()
        lock = JournalFileSymlinkLock(str(self._path), grace_period=LOCK_GRACE_S)
        with _file_errors(self._path):
            super().__init__(str(self._path), lock_obj=lock)
            _check_journal(self._path)
            lock.acquire()
            try:
                drop_partial_line(self._path)
            finally:
                lock.release()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Yields the entries from a number on."""
        with _file_errors(self._path):
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends entries; on disk when it returns."""
        with _file_errors(self._path):
            super().append_logs(logs)


def _check_journal(path: Path) -> None:
    """Raises ValueError for a file of another program, which must stay as it is."""
    with path.open("rb") as file:
        first = file.readline()
    if first and not first.startswith(b'{"op_code":'):
        raise ValueError("the first line is no entry")


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StudyStorageError(
            f"tune.storage: {path}: {error.strerror}; choose a folder that can be written to"
        ) from None
    except ValueError as error:
        raise StudyStorageError(f"tune.storage: {path}: no journal of Optuna: {error}; choose another file") from None

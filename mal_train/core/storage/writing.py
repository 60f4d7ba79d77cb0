"""Writes results by address: to local files, or as objects in stores, the whole object or nothing.

A remote result is written to a local temporary file first and uploaded at the end: with one request, or in parts that
the store joins at the last one. A store shows no object before that, and an existing one is unchanged until then.
Stores have no locks: of two commands that write one object, the later one wins.
"""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mal_train.core import atomic_io
from mal_train.core.errors import ConfigError, OutputError, StorageError, StoreUnreachable
from mal_train.core.storage.addresses import (
    OBJECT_SCHEMES,
    Location,
    base_name,
    is_remote,
    join,
    redact,
    scheme_of,
    sibling,
    split_object,
)
from mal_train.core.storage.disk_space import disk_errors
from mal_train.core.storage.reading import store_of, temporary_file, temporary_folder
from mal_train.core.storage.retry import with_retries


@contextmanager
def write_output(address: Location) -> Iterator[BinaryIO]:
    """Yields a new file that becomes the result when the block ends without an error.

    Args:
        address: a path, written by `atomic_write`, or the address of an object.

    Raises:
        OutputError: the result cannot be written; what was there before is unchanged.
        ConfigError: the extra `remote` is not installed.
    """
    if not is_remote(address):
        with atomic_io.atomic_write(Path(address)) as file:
            yield file
        return
    with temporary_file(base_name(address)) as (path, file):
        with disk_errors(str(address)):
            yield file
            file.flush()
        upload(path, str(address))


def check_writable(address: Location) -> None:
    """Checks before long work that `write_output` can write an address, without leaving anything there.

    For s3:// an upload is begun and ended: this tests the permission. For gs:// and az:// it is only checked that the
    bucket exists and that the credentials may see it.

    Raises:
        OutputError: it cannot be written.
        ConfigError: the extra `remote` is not installed.
    """
    if not is_remote(address):
        atomic_io.check_writable(Path(address))
        return
    text = str(address)
    if scheme_of(text) in OBJECT_SCHEMES and not split_object(text)[1].rpartition("/")[2]:
        raise OutputError(f"{redact(text)}: names no file; give the address of one below it")
    store = store_of(text)
    with _as_output_error(text):
        with_retries(lambda: store.check_writable(text), redact(text), attempts=store.attempts)


def refuse_same_location(source: Location, output: Location) -> None:
    """Protects an input, which an output would replace.

    Raises:
        ConfigError: the output is the input, by whatever path, or by the same address.
    """
    if not is_remote(source) and not is_remote(output):
        atomic_io.refuse_same_file(Path(source), Path(output))
    elif _object_name(source) == _object_name(output):
        raise ConfigError(f"output {redact(output)}: is an input of the same command; choose another one")


def _object_name(location: Location) -> str:
    """Returns an address as it is compared: of an object or a prefix, however scheme and end are spelled."""
    scheme = scheme_of(location)
    return f"{'az' if scheme == 'abfs' else scheme}:{str(location).partition('://')[2].rstrip('/')}"


def upload(source: Path, address: str) -> None:
    """Writes an object from a local file: the whole object or nothing.

    Raises:
        OutputError: the store refuses it or cannot be reached; an existing object is unchanged.
        ConfigError: the extra `remote` is not installed.
    """
    store = store_of(address)
    with _as_output_error(address):
        with_retries(lambda: store.upload(source, address), redact(address), attempts=store.attempts)


def remove(address: str) -> None:
    """Deletes an object; a missing one is no error. Raises as `upload`."""
    store = store_of(address)
    with _as_output_error(address):
        with_retries(lambda: store.remove(address), redact(address), attempts=store.attempts)


@dataclass(frozen=True)
class StagedOutput:
    """A result of several files that are written locally and published together.

    Attributes:
        address: path or address of the main file.
        path: path at which the main file is written; `address` itself if that is local.
        sides: names of files and folders that may be written beside it.
    """

    address: Location
    path: Path
    sides: Sequence[str] = ()

    def publish(self) -> None:
        """Uploads what was written: side files first, the main file last, each as a whole; does nothing locally.

        A side file that was not written this time is deleted in the store, so that none of an earlier run stays beside
        the new main file. Of a folder nothing is deleted there, as in a local one: its prefix may hold other objects,
        and the main file names those that belong to it. The local files are removed at the end.

        Raises:
            OutputError: the store refuses a file or cannot be reached; the local files stay.
        """
        if not is_remote(self.address):
            return
        for name in self.sides:
            source = self.path.with_name(name)
            target = str(sibling(self.address, name))
            if source.is_dir():
                upload_folder(source, target)
            elif source.exists():
                upload(source, target)
            else:
                remove(target)
        upload(self.path, str(self.address))
        self._remove_local()

    def shown(self, path: Path) -> str:
        """Returns where a written file is after `publish`, for messages; `path` itself for any other file."""
        if not is_remote(self.address) or path not in (self.path, *map(self.path.with_name, self.sides)):
            return str(path)
        return redact(sibling(self.address, path.name))

    def _remove_local(self) -> None:
        for source in (self.path, *map(self.path.with_name, self.sides)):
            if source.is_dir():
                shutil.rmtree(source, ignore_errors=True)
            else:
                source.unlink(missing_ok=True)


@contextmanager
def staged_output(address: Location, sides: Sequence[str] = ()) -> Iterator[Path]:
    """Yields the path at which a command writes its result; publishes it at the end of the block, unless it fails.

    Args:
        address: path or address of the main file.
        sides: names of files and folders that the command may write beside it.

    Raises:
        OutputError: from `check_writable` before the block, or from `StagedOutput.publish` after it.
    """
    check_writable(address)
    if not is_remote(address):
        yield Path(address)
        return
    with temporary_folder() as folder:
        staged = StagedOutput(address, folder / base_name(address), sides)
        yield staged.path
        if staged.path.exists():
            staged.publish()


@contextmanager
def staged_outputs(*addresses: Location | None) -> Iterator[list[Path | None]]:
    """Yields a path for each address, None for None; see `staged_output`."""
    with ExitStack() as stack:
        yield [None if address is None else stack.enter_context(staged_output(address)) for address in addresses]


@contextmanager
def staged_folder(address: Location) -> Iterator[Path]:
    """Yields the folder to which a command writes its files; uploads them at the end of the block, unless it fails.

    Each object is whole, the set of them is not: an upload that fails leaves those before it.

    Raises:
        OutputError: an upload failed.
    """
    if not is_remote(address):
        yield Path(address)
        return
    check_writable(join(address, "x"))
    with temporary_folder() as folder:
        yield folder
        upload_folder(folder, str(address))


def upload_folder(source: Path, prefix: str, skip: Collection[str] = ()) -> None:
    """Uploads the files of a folder in alphabetical order, except those in `skip`, by relative name.

    Raises:
        OutputError: an upload failed; the local files are complete.
    """
    for name in _files_below(source):
        if name not in skip:
            upload(source / name, str(join(prefix, name)))


def _files_below(folder: Path) -> list[str]:
    """Returns the names of the files below a folder, relative to it, in alphabetical order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextmanager
def _as_output_error(address: str) -> Iterator[None]:
    try:
        yield
    except (StorageError, StoreUnreachable) as error:
        raise OutputError(f"{error}; {redact(address)} is not written") from None

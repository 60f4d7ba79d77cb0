"""Lists or copies the files below a folder or prefix."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mal_train.core.errors import OutputError, StorageError
from mal_train.core.input_files import resolve_inside
from mal_train.core.storage.addresses import Location, is_remote, join, redact
from mal_train.core.storage.read_ahead import ReadAhead
from mal_train.core.storage.reading import named_as, read_bytes, store_of, temporary_folder
from mal_train.core.storage.retry import with_retries


def list_names(base: Location) -> Iterator[str]:
    """Yields the names of all files below a folder or prefix, relative to it.

    The files of a folder come before those of its folders, each in alphabetical order; the names below a prefix come in
    alphabetical order, after all of them were listed.

    Raises:
        StorageError: the prefix cannot be listed; web servers have no list (FAILED).
        StoreUnreachable, ConfigError: as `read_bytes`.
    """
    if is_remote(base):
        text = str(base)
        store = store_of(text)
        yield from with_retries(lambda: list(store.names(text)), redact(text), attempts=store.attempts)
        return
    for folder, inner, files in os.walk(base):
        inner.sort()
        for name in sorted(files):
            yield os.path.relpath(os.path.join(folder, name), base)


@contextmanager
def local_folder(address: Location, suffixes: tuple[str, ...], max_bytes: int) -> Iterator[Path]:
    """Yields a folder with the files below a folder or prefix: the folder itself, or a temporary download.

    For many small files, which are read several at a time. Errors in the block name the address, as in `local_copy`.

    Args:
        address: folder, or address of a prefix.
        suffixes: only files whose names end in one of them, in any case, are downloaded.
        max_bytes: size limit of one file.

    Raises:
        StorageError, StoreUnreachable, ConfigError: as `read_bytes`; also for a prefix that cannot be listed, and for a
            name that leads out of it (FAILED).
    """
    if not is_remote(address):
        yield Path(address)
        return
    text = str(address)
    with temporary_folder() as folder:
        wanted = [name for name in list_names(text) if name.lower().endswith(suffixes)]
        with ReadAhead(wanted, lambda name: read_bytes(join(text, name), max_bytes), len, str) as ahead:
            for name in ahead:
                _write_below(folder, name, ahead.take(name), text)
        with named_as(folder, text):
            yield folder


def _write_below(folder: Path, name: str, content: bytes, address: str) -> None:
    """Writes the copy of an object below the prefix `address`."""
    if resolve_inside(folder, name) is None:
        raise StorageError(f"{redact(address)}: name {name!r} leads out of the prefix", "FAILED")
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:  # also a name that is too long, or that another object has as a folder
        raise OutputError(
            f"{redact(join(address, name))}: not copied to {folder.parent} ({error.strerror}); free some space there, "
            "or rename the object"
        ) from None

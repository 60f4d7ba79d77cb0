"""Lists the files below a folder or prefix. Reads none."""

import os
from collections.abc import Iterator

from mal_train.core.storage.addresses import Location, is_remote, redact
from mal_train.core.storage.reading import store_of
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

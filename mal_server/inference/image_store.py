"""Where a request's picture comes from: it was sent, it was sent before, or it lies below a folder of the settings.

    Sent → its bytes        Handle → the cache, or ImageNotCached        OnDisk → read when its turn has come

Pictures that interactive calls send are kept, longest unused first to go, within a fixed number of bytes: whoever moves
a box then sends a hash in its place. An entry is found by its whole SHA-256 alone, and nothing lists entries.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias

from mal_server.errors import ImageNotCached, NoSuchFile
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.ops.metrics import Metrics
from mal_train.core.errors import BadImage

ENTRY_BYTES = 256
"""Counted for each entry beside its content: what Python itself takes for it."""


@dataclass(frozen=True)
class InlineImage:
    """Bytes that came with the request; `keep`: a later request may name them by their hash."""

    content: bytes
    keep: bool = False


@dataclass(frozen=True)
class CachedImage:
    """Bytes that came before, by their SHA-256 in lower-case hex."""

    sha256: str


@dataclass(frozen=True)
class FileImage:
    """A file: the name of a folder in the settings, and the path below it."""

    folder: str
    path: str


Picture: TypeAlias = InlineImage | CachedImage | FileImage


class ImageCache:
    """Encoded pictures by SHA-256, the longest unused first to go; safe in threads.

    Args:
        max_bytes: of contents and of what holding them takes; 0 = nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """What is held now; never more than the limit."""
        return self._bytes

    def put(self, content: bytes) -> None:
        """Keeps a picture, unless it alone passes the limit."""
        size = len(content) + ENTRY_BYTES
        if size > self._max_bytes:
            return
        sha256 = hashlib.sha256(content).hexdigest()
        with self._lock:
            if sha256 in self._entries:
                self._entries.move_to_end(sha256)
                return
            while self._bytes + size > self._max_bytes:
                _, gone = self._entries.popitem(last=False)
                self._bytes -= len(gone) + ENTRY_BYTES
            self._entries[sha256] = content
            self._bytes += size

    def get(self, sha256: str) -> bytes | None:
        """The picture, which counts as used now; None when it is not held."""
        with self._lock:
            content = self._entries.get(sha256)
            if content is not None:
                self._entries.move_to_end(sha256)
            return content


class ImageStore:
    """Gives the bytes of pictures.

    Args:
        cache: of what was sent before.
        folders: that requests may name.
        max_file_bytes: of a file on disk.
        metrics: counts hits and misses.
    """

    def __init__(self, cache: ImageCache, folders: AllowedDirs, max_file_bytes: int, metrics: Metrics) -> None:
        self._cache = cache
        self._folders = folders
        self._max_file_bytes = max_file_bytes
        self._metrics = metrics

    def held(self, picture: InlineImage | CachedImage) -> bytes:
        """The bytes that memory holds; takes microseconds.

        Raises:
            ImageNotCached: it was never sent, or is held no more.
        """
        if isinstance(picture, InlineImage):
            return picture.content
        content = self._cache.get(picture.sha256)
        self._metrics.looked_up(found=content is not None)
        if content is None:
            raise ImageNotCached(f"image {picture.sha256[:12]}…: not held by this server; send its content")
        return content

    def read(self, picture: FileImage) -> bytes:
        """The bytes of a file; for threads.

        Raises:
            RequestRefused, NoSuchFile: the path is none, or leads nowhere.
            BadImage: the file is too large or cannot be read.
        """
        name = f"{picture.folder}/{picture.path}"
        try:
            with self._folders.open(picture.folder, picture.path, "image.uri") as file:
                content = file.read(self._max_file_bytes + 1)
        except NoSuchFile as error:
            reason = "IMAGE_NOT_FOUND" if error.reason == "FILE_NOT_FOUND" else error.reason
            raise NoSuchFile(str(error), reason) from None
        except OSError as error:
            raise BadImage(f"{name}: cannot be read ({error.strerror})", "IMAGE_NOT_FOUND") from None
        if len(content) > self._max_file_bytes:
            raise BadImage(f"{name}: more than {self._max_file_bytes} bytes, which is the limit", "IMAGE_TOO_LARGE")
        return content

    def was_read(self, picture: Picture) -> None:
        """The picture turned out to be one: it is kept where its request wants that."""
        if isinstance(picture, InlineImage) and picture.keep:
            self._cache.put(picture.content)

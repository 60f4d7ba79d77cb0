"""Sources of a request's image, and the store that returns its encoded bytes.

    InlineImage  bytes in the request
    CachedImage  the SHA-256 of bytes that an earlier request sent; ImageNotCached if they are gone
    FileImage    a file in one of the server's folders, read when its request is prepared

The cache holds images of interactive requests, so that a client that moves a box sends a hash instead of the image. It
finds entries only by their complete hash and their owner (the token that sent them), and never lists them. The hash of
another client's image gives neither its masks nor the fact that it was sent.
"""

from dataclasses import dataclass
from typing import TypeAlias

from mal_server.errors import ImageNotCached, NoSuchFile
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.ops.metrics import Metrics
from mal_train.core.errors import BadImage
from mal_train.core.images.header import bytes_error
from mal_train.core.lru import LruCache, sha256_of

ENTRY_OVERHEAD_BYTES = 256
"""Memory of a cache entry beside its content."""


@dataclass(frozen=True)
class InlineImage:
    """Bytes in the request; `keep`: cached once decoded, for requests of the same `owner`."""

    content: bytes
    keep: bool = False
    owner: str = ""


@dataclass(frozen=True)
class CachedImage:
    """Bytes of an earlier request of the same `owner`, by their SHA-256 in lower-case hex."""

    sha256: str
    owner: str = ""


@dataclass(frozen=True)
class FileImage:
    """A file: the name of a configured folder, and a path relative to it."""

    folder: str
    path: str


ImageSource: TypeAlias = InlineImage | CachedImage | FileImage


class ImageCache:
    """Least-recently-used cache of encoded images by owner and SHA-256; thread-safe.

    Args:
        max_bytes: limit of contents and overhead; 0 disables the cache.
    """

    def __init__(self, max_bytes: int) -> None:
        self._images = LruCache[bytes](max_bytes)

    @property
    def size_bytes(self) -> int:
        """Memory held now; never above the limit."""
        return self._images.size_bytes

    def put(self, content: bytes, owner: str = "") -> None:
        """Adds an image, unless it alone exceeds the limit."""
        size_bytes = len(content) + ENTRY_OVERHEAD_BYTES
        # Hashing takes about a millisecond per megabyte.
        if self._images.accepts(size_bytes):
            self._images.put(_key(owner, sha256_of(content)), content, size_bytes)

    def get(self, sha256: str, owner: str = "") -> bytes | None:
        """Returns an image of an owner and marks it as used; None if it is not cached."""
        return self._images.get(_key(owner, sha256))


class ImageStore:
    """Returns the encoded bytes of image sources.

    Args:
        cache: images of earlier requests.
        folders: folders that requests may name.
        max_file_bytes: limit of a file's size.
        metrics: counts cache hits and misses.
    """

    def __init__(self, cache: ImageCache, folders: AllowedDirs, max_file_bytes: int, metrics: Metrics) -> None:
        self._cache = cache
        self._folders = folders
        self._max_file_bytes = max_file_bytes
        self._metrics = metrics

    def get(self, source: InlineImage | CachedImage) -> bytes:
        """Returns bytes from memory, in microseconds.

        Raises:
            ImageNotCached: the image was never sent, or has been evicted.
        """
        if isinstance(source, InlineImage):
            return source.content
        content = self._cache.get(source.sha256, source.owner)
        self._metrics.cache_looked_up(hit=content is not None)
        if content is None:
            raise ImageNotCached(f"image {source.sha256[:12]}…: not in the cache; send its content")
        return content

    def read(self, source: FileImage) -> bytes:
        """Reads a file; blocks, so call it from a thread.

        Raises:
            InvalidRequest: the path is invalid.
            NoSuchFile: the folder or the file does not exist.
            BadImage: the file is too large or cannot be read.
        """
        name = f"{source.folder}/{source.path}"
        try:
            with self._folders.open(source.folder, source.path, "image.uri") as file:
                content = file.read(self._max_file_bytes + 1)
        except NoSuchFile as error:
            reason = "IMAGE_NOT_FOUND" if error.reason == "FILE_NOT_FOUND" else error.reason
            raise NoSuchFile(str(error), reason) from None
        except OSError as error:
            raise BadImage(f"{name}: cannot be read ({error.strerror})", "IMAGE_NOT_FOUND") from None
        if len(content) > self._max_file_bytes:
            raise bytes_error("too many bytes", self._max_file_bytes, name)
        return content

    def on_decoded(self, source: ImageSource) -> None:
        """Caches an image that proved decodable, if its request asks for that."""
        if isinstance(source, InlineImage) and source.keep:
            self._cache.put(source.content, source.owner)


def _key(owner: str, sha256: str) -> str:
    """Returns the key of a cache entry. Every hash has 64 digits, so no two pairs have the same."""
    return f"{sha256} {owner}"

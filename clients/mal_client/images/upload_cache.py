"""Which pictures a server was sent and may still hold, so that the next call names them by their hash."""

from __future__ import annotations

from mal_client.images.image_input import EncodedImage
from mal_train.core.lru import LruCache, sha256_of

ENTRY_BYTES = 256
"""Memory of one entry."""

MAX_BYTES = 512 * ENTRY_BYTES
"""Limit of all entries; an image whose entry was evicted is sent again."""

MIN_BYTES = 4096
"""Smaller files are sent each time: a hash would save nothing that anybody feels."""


class UploadCache:
    """What one server was sent; safe in threads."""

    def __init__(self) -> None:
        self._known = LruCache[bool](MAX_BYTES)

    def of(self, image: EncodedImage) -> UploadedImage | None:
        """The picture's handle; None for one that is not worth it. Hashes the file: about a millisecond a megabyte."""
        if len(image.content) < MIN_BYTES:
            return None
        return UploadedImage(self, sha256_of(image.content))

    def knows(self, sha256: str) -> bool:
        """The server was sent this picture and has not said since that it does not hold it."""
        return sha256 in self._known

    def note(self, sha256: str) -> None:
        """The server has it now."""
        self._known.put(sha256, True, ENTRY_BYTES)

    def forget(self, sha256: str) -> None:
        """The server does not hold it."""
        self._known.discard(sha256)


class UploadedImage:
    """One picture at one server."""

    def __init__(self, handles: UploadCache, sha256: str) -> None:
        self._handles = handles
        self.sha256 = sha256

    @property
    def is_known(self) -> bool:
        """The server may still hold the picture."""
        return self._handles.knows(self.sha256)

    def note(self) -> None:
        """The server answered for it, so it holds it."""
        self._handles.note(self.sha256)

    def forget(self) -> None:
        """The server does not hold it."""
        self._handles.forget(self.sha256)

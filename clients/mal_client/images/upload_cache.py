"""Remembers which images a server has received, so that the next call sends their SHA-256 in place of their bytes."""

from __future__ import annotations

from mal_client.images.image_input import EncodedImage
from mal_train.core.lru import LruCache, sha256_of

ENTRY_BYTES = 256
"""Memory of one entry."""

MAX_BYTES = 512 * ENTRY_BYTES
"""Limit of all entries; an image whose entry was evicted is sent again."""

MIN_BYTES = 4096
"""Smaller files are always sent: a hash would save too little."""


class UploadCache:
    """SHA-256 of the images that one server has received; safe in threads."""

    def __init__(self) -> None:
        self._known = LruCache[bool](MAX_BYTES)

    def entry(self, image: EncodedImage) -> UploadedImage | None:
        """Returns the entry of an image; None when the image is too small. Hashing takes about 1 ms/MB."""
        if len(image.content) < MIN_BYTES:
            return None
        return UploadedImage(self._known, sha256_of(image.content))


class UploadedImage:
    """Entry of one image in the cache of one server."""

    def __init__(self, known: LruCache[bool], sha256: str) -> None:
        self._known = known
        self.sha256 = sha256

    @property
    def is_known(self) -> bool:
        """True when the server has received the image and has not reported it missing since."""
        return self.sha256 in self._known

    def add(self) -> None:
        """Notes that the server has the image, because it answered for it."""
        self._known.put(self.sha256, True, ENTRY_BYTES)

    def discard(self) -> None:
        """Notes that the server does not have the image."""
        self._known.discard(self.sha256)

"""LRU cache of the page's images by the SHA-256 of their bytes, so that editing a box sends numbers and no image."""

from __future__ import annotations

from dataclasses import dataclass

from mal_train.core.images.container import ImageHeader
from mal_train.core.lru import LruCache, sha256_of


@dataclass(frozen=True)
class StoredImage:
    """An encoded image and its header."""

    sha256: str
    encoded: bytes
    header: ImageHeader


class ImageStore:
    """Stores encoded images; evicts the least recently used ones.

    Args:
        max_bytes: size limit of all images together. The newest image stays even if it is larger.
    """

    def __init__(self, max_bytes: int) -> None:
        self._images = LruCache[StoredImage](max_bytes, keep_newest=True)

    def add(self, encoded: bytes, header: ImageHeader) -> StoredImage:
        """Stores an image, and evicts others if the size limit is exceeded."""
        image = StoredImage(sha256_of(encoded), encoded, header)
        self._images.put(image.sha256, image, len(encoded))
        return image

    def get(self, sha256: str) -> StoredImage | None:
        """Returns an image; None if it was never stored or has been evicted, and the page must send it again."""
        return self._images.get(sha256)

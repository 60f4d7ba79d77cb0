"""The pictures that the page has opened, by the SHA-256 of their bytes: a box edit sends numbers, not a picture."""

from __future__ import annotations

from dataclasses import dataclass

from mal_train.core.lru import LruCache, sha256_of
from mal_train.core.masks.images import ImageHeader


@dataclass(frozen=True)
class StoredImage:
    """An encoded picture and what its header says."""

    sha256: str
    content: bytes
    header: ImageHeader


class ImageStore:
    """Keeps encoded pictures; those that were used longest ago go first.

    Args:
        max_bytes: of all pictures together. The newest one stays even when it alone is larger.
    """

    def __init__(self, max_bytes: int) -> None:
        self._images = LruCache[StoredImage](max_bytes, keep_newest=True)

    def add(self, content: bytes, header: ImageHeader) -> StoredImage:
        """Keeps a picture, and lets older ones go where there is no room."""
        image = StoredImage(sha256_of(content), content, header)
        self._images.put(image.sha256, image, len(content))
        return image

    def get(self, sha256: str) -> StoredImage | None:
        """The picture; None when it was never sent or has gone: the page then sends it again."""
        return self._images.get(sha256)

"""The pictures that the page has opened, by the SHA-256 of their bytes: a box edit sends numbers, not a picture."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

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
        self.max_bytes = max_bytes
        self._images: OrderedDict[str, StoredImage] = OrderedDict()
        self._size = 0

    def add(self, content: bytes, header: ImageHeader) -> StoredImage:
        """Keeps a picture, and lets older ones go where there is no room."""
        image = StoredImage(hashlib.sha256(content).hexdigest(), content, header)
        if image.sha256 not in self._images:
            self._size += len(content)
        self._images[image.sha256] = image
        self._images.move_to_end(image.sha256)
        while self._size > self.max_bytes and len(self._images) > 1:
            _, oldest = self._images.popitem(last=False)
            self._size -= len(oldest.content)
        return image

    def get(self, sha256: str) -> StoredImage | None:
        """The picture; None when it was never sent or has gone: the page then sends it again."""
        image = self._images.get(sha256)
        if image is not None:
            self._images.move_to_end(sha256)
        return image

"""Remembers which images a server has received, so that the next call sends their SHA-256 in place of their bytes.

Each of several servers behind one address has a cache of its own, and a call cannot choose its server. So a hash that
one of them does not know doubles the number of uploads before the next one is sent, and each that is known lowers it.
"""

from __future__ import annotations

from dataclasses import dataclass

from mal_client.images.image_input import EncodedImage
from mal_train.core.lru import LruCache, sha256_of

ENTRY_BYTES = 256
"""Memory of one entry."""

MAX_BYTES = 512 * ENTRY_BYTES
"""Limit of all entries; an image whose entry was evicted is sent again."""

MIN_BYTES = 4096
"""Smaller files are always sent: a hash would save too little."""

MAX_UPLOADS = 64
"""Limit of the uploads before a hash is sent again; more than the servers behind one address, as a rule."""


@dataclass(frozen=True)
class _Uploads:
    """Uploads of one image since a server did not know its hash, and the number before the next hash."""

    done: int = 0
    needed: int = 1


class UploadCache:
    """SHA-256 of the images that the servers of one address have received; safe in threads."""

    def __init__(self) -> None:
        self._known = LruCache[_Uploads](MAX_BYTES)

    def entry(self, image: EncodedImage) -> UploadedImage | None:
        """Returns the entry of an image; None when the image is too small. Hashing takes about 1 ms/MB."""
        if len(image.content) < MIN_BYTES:
            return None
        return UploadedImage(self._known, sha256_of(image.content))


class UploadedImage:
    """Entry of one image in the cache of one address."""

    def __init__(self, known: LruCache[_Uploads], sha256: str) -> None:
        self._known = known
        self.sha256 = sha256

    @property
    def is_known(self) -> bool:
        """True when the image was received often enough for its hash to be sent."""
        uploads = self._uploads
        return uploads.done >= uploads.needed

    def add(self, *, was_hash: bool) -> None:
        """Notes that a server answered for the image, which was sent as bytes or as its hash."""
        uploads = self._uploads
        if was_hash:
            needed = max(1, uploads.needed - 1)
            self._put(_Uploads(needed, needed))
        else:
            self._put(_Uploads(uploads.done + 1, uploads.needed))

    def discard(self) -> None:
        """Notes that a server does not know the hash."""
        self._put(_Uploads(0, min(2 * self._uploads.needed, MAX_UPLOADS)))

    @property
    def _uploads(self) -> _Uploads:
        return self._known.get(self.sha256) or _Uploads()

    def _put(self, uploads: _Uploads) -> None:
        self._known.put(self.sha256, uploads, ENTRY_BYTES)

"""Which pictures a server was sent and may still hold, so that the next call names them by their hash."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from mal_client.images.image_input import EncodedImage

REMEMBERED = 512
"""Pictures; the longest unused is forgotten first, and then simply sent again."""

MIN_BYTES = 4096
"""Smaller files are sent each time: a hash would save nothing that anybody feels."""


class UploadCache:
    """What one server was sent; safe in threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, image: EncodedImage) -> UploadedImage | None:
        """The picture's handle; None for one that is not worth it. Hashes the file: about a millisecond a megabyte."""
        if len(image.content) < MIN_BYTES:
            return None
        return UploadedImage(self, hashlib.sha256(image.content).hexdigest())

    def knows(self, sha256: str) -> bool:
        """The server was sent this picture and has not said since that it does not hold it."""
        with self._lock:
            return sha256 in self._known

    def note(self, sha256: str) -> None:
        """The server has it now."""
        with self._lock:
            self._known[sha256] = None
            self._known.move_to_end(sha256)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def forget(self, sha256: str) -> None:
        """The server does not hold it."""
        with self._lock:
            self._known.pop(sha256, None)


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

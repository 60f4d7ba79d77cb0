"""Least-recently-used cache with a limit in bytes, keyed by the SHA-256 of encoded content.

Threads and asyncio: every method holds a lock for a few microseconds and never waits for anything else, so all of them
may be called from any thread and from an event loop. Hash content before the call, in a thread if it is large: SHA-256
takes about a millisecond per megabyte.
"""

import hashlib
import threading
from collections import OrderedDict
from typing import Generic, TypeVar

Value = TypeVar("Value")


def sha256_of(content: bytes) -> str:
    """Returns the SHA-256 as 64 lower-case hex digits."""
    return hashlib.sha256(content).hexdigest()


class LruCache(Generic[Value]):
    """Map from SHA-256 to values that evicts the least recently used entries above its limit.

    >>> cache = LruCache[str](max_bytes=10)
    >>> cache.put("a", "first", 6)
    >>> cache.put("b", "second", 6)
    >>> cache.get("a"), cache.get("b"), cache.size_bytes
    (None, 'second', 6)

    Args:
        max_bytes: limit of the sum of all sizes; 0 disables the cache.
        keep_newest: keep the newest entry even if it alone exceeds the limit. Otherwise such an entry is not stored.
    """

    def __init__(self, max_bytes: int, *, keep_newest: bool = False) -> None:
        self._max_bytes = max_bytes
        self._keep_newest = keep_newest
        self._entries: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self._size_bytes = 0
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of all entries."""
        return self._size_bytes

    def __contains__(self, sha256: str) -> bool:
        """Returns True for a cached key, without marking it as used."""
        with self._lock:
            return sha256 in self._entries

    def get(self, sha256: str) -> Value | None:
        """Returns a value and marks it as used; None if it is not cached."""
        with self._lock:
            if sha256 not in self._entries:
                return None
            self._entries.move_to_end(sha256)
            return self._entries[sha256][0]

    def accepts(self, size_bytes: int) -> bool:
        """Returns True if `put` stores a value of this size."""
        return size_bytes <= self._max_bytes or self._keep_newest

    def put(self, sha256: str, value: Value, size_bytes: int) -> None:
        """Adds or replaces a value of `size_bytes`, marks it as used and evicts others above the limit."""
        if not self.accepts(size_bytes):
            return
        with self._lock:
            self._remove(sha256)
            # Evict first: the sum never exceeds the limit, not even for a moment.
            while self._entries and self._size_bytes + size_bytes > self._max_bytes:
                self._remove(next(iter(self._entries)))
            self._entries[sha256] = (value, size_bytes)
            self._size_bytes += size_bytes

    def discard(self, sha256: str) -> None:
        """Removes an entry if it is cached."""
        with self._lock:
            self._remove(sha256)

    def _remove(self, sha256: str) -> None:
        if sha256 in self._entries:
            _, size_bytes = self._entries.pop(sha256)
            self._size_bytes -= size_bytes

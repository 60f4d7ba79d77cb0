"""Bounds the memory of long calls: a call that would exceed the limit is refused, not delayed.

Unlike `MemoryLimiter`: this memory is held until its call ends, and a call that waited for more would go on holding
what it has. Knows nothing of what the bytes are.
"""

from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from mal_server.errors import MemoryFull
from mal_server.scheduling.background import when_done


class MemoryQuota:
    """Bytes that calls may hold together; used from one event loop.

    Args:
        limit: bytes. The call that has held some for longest may exceed it: its own size is bounded elsewhere, and a
            later call must not cost it hours of work.
        setting: name of the setting that holds the limit, for messages.
    """

    def __init__(self, limit: int, setting: str) -> None:
        self._limit = limit
        self._setting = setting
        self.used = 0
        """Bytes held now."""
        self._holders: dict[Reservation, None] = {}
        """Reservations that hold something, the first one first."""

    def reserve(self) -> "Reservation":
        """Returns an empty reservation; a context manager that releases it."""
        return Reservation(self)

    def _grow(self, reservation: "Reservation", size: int) -> None:
        oldest = next(iter(self._holders), reservation)
        if oldest is not reservation and self.used + size > self._limit:
            raise MemoryFull(
                f"{self._setting}: other calls hold {self.used - reservation.size} of {self._limit} bytes, this one "
                f"needs {reservation.size + size}; retry when one of them has ended"
            )
        self._holders[reservation] = None
        self.used += size

    def _release(self, reservation: "Reservation") -> None:
        self._holders.pop(reservation, None)
        self.used -= reservation.size


class Reservation:
    """Bytes that one call holds of a `MemoryQuota`."""

    def __init__(self, quota: MemoryQuota) -> None:
        self._quota = quota
        self.size = 0
        """Bytes held."""
        self._future: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        when_done(self._future, self._release)

    def grow(self, size: int) -> None:
        """Holds `size` bytes more. Raises MemoryFull if other calls, an older one among them, hold too many."""
        self._quota._grow(self, size)
        self.size += size

    def hold_until(self, future: "Future[Any]") -> None:
        """Keeps the bytes until `future` is done, even if the call ends before: its thread still uses them."""
        self._future = future

    def _release(self) -> None:
        self._quota._release(self)
        self.size = 0

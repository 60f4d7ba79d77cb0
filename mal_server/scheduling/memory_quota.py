"""Bounds the memory of long calls: a call that would exceed the limit is refused, not delayed.

Unlike `MemoryLimiter`: this memory is held until its call ends, and a call that waited for more would go on holding
what it has. Knows nothing of what the bytes are.
"""

from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from mal_server.errors import CallTooLarge, MemoryFull
from mal_server.scheduling.background import when_done


class MemoryQuota:
    """Bytes that calls may hold together; used from one event loop.

    No call may hold more than the limit. The one that has held some for longest is not refused because of the others,
    since a later call must not cost it hours of work: they fail as soon as they need more themselves.

    Args:
        limit: bytes.
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
        needed = reservation.size + size
        if needed > self._limit:
            raise CallTooLarge(
                f"{self._setting}: this call needs {needed} bytes; one call may hold {self._limit}; send fewer images "
                "in one call, or let the operator raise the setting"
            )
        oldest = next(iter(self._holders), reservation)
        if oldest is not reservation and self.used + size > self._limit:
            raise MemoryFull(
                f"{self._setting}: other calls hold {self.used - reservation.size} of {self._limit} bytes, this one "
                f"needs {needed}; retry when one of them has ended"
            )
        self._holders[reservation] = None
        self.used += size

    def _shrink(self, size: int) -> None:
        self.used -= size

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
        """Holds `size` bytes more; call it before they are allocated.

        Raises:
            CallTooLarge: this call alone would exceed the limit.
            MemoryFull: other calls, an older one among them, hold too many.
        """
        if size < 0:
            raise ValueError(f"{size} bytes; it must be 0 or more")
        self._quota._grow(self, size)
        self.size += size

    def shrink(self, size: int) -> None:
        """Gives `size` of the held bytes back. Raises ValueError for more than are held, or fewer than 0."""
        if not 0 <= size <= self.size:
            raise ValueError(f"{size} bytes; it must lie between 0 and the {self.size} that are held")
        self._quota._shrink(size)
        self.size -= size

    def adjust(self, change: int) -> None:
        """Holds `change` bytes more, or fewer if it is negative: after a size that was estimated is known.

        Raises:
            CallTooLarge, MemoryFull: as `grow`.
        """
        if change > 0:
            self.grow(change)
        else:
            self.shrink(-change)

    def hold_until(self, future: "Future[Any]") -> None:
        """Keeps the bytes until `future` is done, even if the call ends before: its thread still uses them."""
        self._future = future

    def _release(self) -> None:
        self._quota._release(self)
        self.size = 0

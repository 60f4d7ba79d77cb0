"""Bytes that calls of one kind may hold together; whoever comes too late is refused, not kept waiting.

Unlike `cpu.Room`, in which short steps wait their turn: what is counted here is held as long as a call runs, and one
that waited for it would hold what it has read already. Knows nothing of what the bytes are.
"""

from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from mal_server.errors import MemoryFull
from mal_server.scheduling.background import when_done


class MemoryQuota:
    """Bytes for all calls; used from one event loop.

    Args:
        size: all of them. The call that has held some for longest may hold more: what one call may hold is bounded
            elsewhere, and hours of its work are not lost to one that came after it.
        name: of the setting that says so.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self.held = 0
        """Bytes held now."""
        self._holders: dict[Reservation, None] = {}
        """Shares that hold something, the first one first."""

    def share(self) -> "Reservation":
        """What one call holds; a context manager that gives it back."""
        return Reservation(self)

    def _take(self, share: "Reservation", size: int) -> None:
        first = next(iter(self._holders), share)
        if first is not share and self.held + size > self._size:
            raise MemoryFull(
                f"{self.held - share.own} of {self._size} bytes ({self._name}) are held by other evaluations that are "
                f"under way, and this one needs {share.own + size}; come back when one of them is done"
            )
        self._holders[share] = None
        self.held += size

    def _give_back(self, share: "Reservation") -> None:
        self._holders.pop(share, None)
        self.held -= share.own


class Reservation:
    """What one call holds of a `MemoryQuota`."""

    def __init__(self, budget: MemoryQuota) -> None:
        self._budget = budget
        self.own = 0
        """Bytes that it holds."""
        self._step: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        when_done(self._step, self._give_back)

    def outlast(self, step: "Future[Any]") -> None:
        """Holds everything until this step has ended, though the call may be over: its thread fills the memory on."""
        self._step = step

    def take(self, size: int) -> None:
        """Holds so many bytes more. Raises MemoryFull where others hold too much for that, one since before this."""
        self._budget._take(self, size)
        self.own += size

    def _give_back(self) -> None:
        self._budget._give_back(self)
        self.own = 0

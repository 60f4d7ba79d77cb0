"""Bytes that calls of one kind may hold together; whoever comes too late is refused, not kept waiting.

Unlike `cpu.Room`, in which short steps wait their turn: what is counted here is held as long as a call runs, and one
that waited for it would hold what it has read already. Knows nothing of what the bytes are.
"""

from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from mal_server.errors import MemoryFull
from mal_server.steps import once_done


class Budget:
    """Bytes for all calls; used from one event loop.

    Args:
        size: all of them. A call that is alone may hold more: what one call may hold is bounded elsewhere.
        name: of the setting that says so.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self.held = 0
        """Bytes held now."""

    def share(self) -> "Share":
        """What one call holds; a context manager that gives it back."""
        return Share(self)

    def _take(self, size: int, own: int) -> None:
        if self.held > own and self.held + size > self._size:
            raise MemoryFull(
                f"{self.held - own} of {self._size} bytes ({self._name}) are held by other evaluations that are under "
                f"way, and this one needs {own + size}; come back when one of them is done"
            )
        self.held += size


class Share:
    """What one call holds of a `Budget`."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._own = 0
        self._step: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        once_done(self._step, self._give_back)

    def outlast(self, step: "Future[Any]") -> None:
        """Holds everything until this step has ended, though the call may be over: its thread fills the memory on."""
        self._step = step

    def take(self, size: int) -> None:
        """Holds so many bytes more. Raises MemoryFull where others hold too much for that."""
        self._budget._take(size, self._own)
        self._own += size

    def _give_back(self) -> None:
        self._budget.held -= self._own
        self._own = 0

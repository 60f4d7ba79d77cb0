"""A caller's handle to its request in the batcher. Passive: only the batcher counts and changes its state."""

import asyncio
from collections.abc import AsyncGenerator, Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from mal_server.scheduling.priority import Priority
from mal_server.scheduling.request_queue import RequestQueue

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
R = TypeVar("R")


class QueueFull(Exception):
    """The queue is full or too slow for the deadline; `retry_after_s` is the estimated time until it has room."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """The caller's deadline passed before the work started or finished."""


@dataclass(frozen=True)
class BatchSlice(Generic[R]):
    """One request's part of a finished batch.

    Attributes:
        indices: of these items among the submitted ones.
        outcomes: a result or an error for each.
        queue_s: longest wait of these items before the batch started.
        run_s: duration of the batch.
        batch_size: items in the batch, other requests' included.
    """

    indices: tuple[int, ...]
    outcomes: tuple[R | Exception, ...]
    queue_s: float
    run_s: float
    batch_size: int


class _Batcher(Protocol[K, T, R]):
    def enqueue(self, admission: "Admission[K, T, R]", key: K, items: Sequence[T]) -> None: ...
    def close(self, admission: "Admission[K, T, R]", *, cancelled: bool) -> None: ...


class Admission(Generic[K, T, R]):
    """Capacity that one request holds; a context manager that closes it.

    Attributes:
        priority: of all its items.
        deadline: loop time from which they must not start.
        item_bytes: memory that each holds while it waits.
        waiting: items admitted and not yet started.
        unanswered: items submitted and not yet delivered.
        queue: the queue that its items were put into; None before.
        slices: delivered, not yet read.
        drop_cause: reason under which its items are counted if their results are not read.
        is_open: not closed yet.
    """

    def __init__(
        self, batcher: "_Batcher[K, T, R]", count: int, *, item_bytes: float, priority: Priority, deadline: float
    ) -> None:
        self._batcher = batcher
        self.priority = priority
        self.deadline = deadline
        self.item_bytes = item_bytes
        self.waiting = count
        self.unanswered = 0
        self.queue: RequestQueue[Admission[K, T, R], T] | None = None
        self.slices: asyncio.Queue[BatchSlice[R]] = asyncio.Queue()
        self.drop_cause = "cancelled"
        self.is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The caller receives any other error as its result, so those do not count as dropped.
        self.close(cancelled=isinstance(error, asyncio.CancelledError | GeneratorExit | DeadlineExceeded))

    async def submit(self, key: K, items: Sequence[T]) -> AsyncGenerator[BatchSlice[R], None]:
        """Runs the items and yields a slice for each batch that held some of them; may be called once.

        Raises:
            ValueError: more items than were admitted, or a second call.
        """
        self._batcher.enqueue(self, key, items)
        remaining = len(items)
        while remaining:
            batch_slice = await self.slices.get()
            remaining -= len(batch_slice.indices)
            yield batch_slice

    def close(self, *, cancelled: bool = False) -> None:
        """Releases what is left; `cancelled` counts it as dropped. Further calls have no effect."""
        self._batcher.close(self, cancelled=cancelled)

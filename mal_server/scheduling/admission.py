"""A caller's handle to its request in the batcher, with the results and errors that the caller receives.

Only the batcher changes an admission's state.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Hashable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from mal_server.scheduling.priority import Priority
from mal_server.scheduling.request_queue import RequestQueue

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFull(Exception):
    """The queue has no capacity for a request, or is too long for its deadline.

    Attributes:
        retry_after_s: estimated time until a retry can succeed.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(Exception):
    """The deadline of a request passed before its items started or finished."""


@dataclass(frozen=True)
class BatchSlice(Generic[Result]):
    """Outcomes of one request's items in one finished batch.

    Attributes:
        indices: indices of the items in the sequence given to `Admission.submit`.
        outcomes: a result or an error for each of these items.
        queue_s: longest time that one of these items was queued.
        run_s: duration of the batch; 0 for items that never ran.
        batch_size: number of items in the batch, including those of other requests; 0 for items that never ran.
    """

    indices: tuple[int, ...]
    outcomes: tuple[Result | Exception, ...]
    queue_s: float
    run_s: float
    batch_size: int


class _Batcher(Protocol[Key, Item, Result]):
    """Methods of `Batcher` that an admission calls; a protocol because `batcher` imports this module."""

    def enqueue(self, admission: Admission[Key, Item, Result], key: Key, items: Sequence[Item]) -> None: ...
    def hold(self, admission: Admission[Key, Item, Result], size_bytes: int) -> None: ...
    def free(self, admission: Admission[Key, Item, Result], size_bytes: int) -> None: ...
    def close(self, admission: Admission[Key, Item, Result], *, cancelled: bool) -> None: ...


class Admission(Generic[Key, Item, Result]):
    """Capacity that one request holds in a `Batcher`; a context manager that releases it.

    Callers use `submit` and `close`; the attributes are for the batcher.

    Attributes:
        priority: priority of all items.
        caller: caller that sent the request.
        deadline: loop time after which no item may start.
        item_bytes: bytes that each item and its result hold.
        held_bytes: bytes that the request holds now.
        taken_bytes: those of them that belong to slices which the caller has read.
        waiting: number of items admitted and not yet started.
        unanswered: number of items submitted and not yet delivered.
        queue: queue that holds the submitted items; None before `submit`.
        slices: delivered slices that the caller has not read.
        drop_cause: "cancelled" or "deadline": cause in metrics of items whose results are not read.
        is_open: False after `close`.
    """

    def __init__(
        self,
        batcher: _Batcher[Key, Item, Result],
        count: int,
        size_bytes: int,
        shared_bytes: int,
        *,
        priority: Priority,
        caller: Hashable,
        deadline: float,
    ) -> None:
        self._batcher = batcher
        self.priority = priority
        self.caller = caller
        self.deadline = deadline
        self.item_bytes = size_bytes // count
        self.held_bytes = size_bytes + shared_bytes
        self.taken_bytes = 0
        self.waiting = count
        self.unanswered = 0
        self.queue: RequestQueue[Admission[Key, Item, Result], Item] | None = None
        self.slices: asyncio.Queue[BatchSlice[Result]] = asyncio.Queue()
        self.drop_cause = "cancelled"
        self.is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After any other error the caller has its answer, so nothing counts as dropped.
        self.close(cancelled=isinstance(error, asyncio.CancelledError | GeneratorExit | DeadlineExceeded))

    async def submit(self, key: Key, items: Sequence[Item]) -> AsyncGenerator[BatchSlice[Result], None]:
        """Queues the items and yields a slice for each batch that held some of them; may be called once.

        Slices arrive in order of execution. The error of an item, such as `DeadlineExceeded`, is its outcome and is not
        raised. Cancelling the caller inside the `with` block drops the items that have not started.

        Args:
            key: items of all requests with equal keys may share a batch.
            items: at most as many as were admitted; the capacity of the others is freed.

        Raises:
            ValueError: more items than were admitted, or a second call.
            Exception: the error given to `Batcher.fail_all`, if that was called before.
        """
        self._batcher.enqueue(self, key, items)
        remaining = len(items)
        del items  # each is freed when its batch has run
        while remaining:
            batch_slice = await self.slices.get()
            remaining -= len(batch_slice.indices)
            self.taken_bytes += len(batch_slice.indices) * self.item_bytes
            yield batch_slice
            del batch_slice

    def hold(self, size_bytes: int) -> None:
        """Counts the memory of what was made of the slices read so far, if it is more than was counted for them.

        Raises:
            QueueFull: other requests hold the memory that this needs.
        """
        self._batcher.hold(self, size_bytes - self.taken_bytes)

    def free_taken(self) -> None:
        """Counts the memory of all slices read so far, and of what was made of them, as free."""
        self._batcher.free(self, self.taken_bytes)
        self.taken_bytes = 0

    def close(self, *, cancelled: bool = False) -> None:
        """Frees the remaining capacity and drops queued items; further calls have no effect.

        Args:
            cancelled: count items without a result, and results that were not read, as dropped in metrics.
        """
        self._batcher.close(self, cancelled=cancelled)

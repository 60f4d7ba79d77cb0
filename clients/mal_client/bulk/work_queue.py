"""Items of a bulk job that still need a result, shared by the streams to all servers.

An item waits, is in flight on one stream, or is settled. The items of a stream that ends are put back, so that another
server can take them. `WorkQueue` alone holds the lock; windows are passive.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from mal_client.types import BoxPoints, BoxXywh, ModelRef

MIN_WAIT_S = 0.001


@dataclass(frozen=True)
class WorkItem:
    """One image and some of its boxes.

    Attributes:
        item_id: `KEY`, or `KEY.PART` for a part of an item that was split; parts may be split again. KEY is the
            caller's name and has no dot. Unique among the items in flight.
        boxes: boxes by the caller's keys.
        resends: number of times that the item was sent again because of RetryInfo.
        points: by the keys of their boxes; may have keys of other boxes.
    """

    item_id: str
    boxes: dict[int, BoxXywh]
    resends: int = 0
    points: BoxPoints = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The caller's name of the item, the same for all of its parts."""
        return self.item_id.partition(".")[0]

    def with_boxes(self, keys: Iterable[int]) -> WorkItem:
        """Returns the item with some of its boxes."""
        return replace(self, boxes={key: self.boxes[key] for key in keys})

    def split(self) -> tuple[WorkItem, WorkItem]:
        """Returns two parts with half of the boxes each."""
        keys = list(self.boxes)
        first, second = self.with_boxes(keys[: len(keys) // 2]), self.with_boxes(keys[len(keys) // 2 :])
        return replace(first, item_id=f"{self.item_id}.0"), replace(second, item_id=f"{self.item_id}.1")


@dataclass
class Window:
    """Items in flight on one stream; `WorkQueue` alone changes it.

    Attributes:
        max_items: limit of items in flight.
        max_bytes: limit of their encoded bytes; a single item may exceed it.
        is_open: False once the stream has ended.
        is_ending: it takes no further items, and ends when those in flight have results.
        items: items in flight, by id.
        sizes: encoded bytes of those whose image was read.
        active_at: clock time of the last response, or of the first item in flight.
    """

    max_items: int = 1
    max_bytes: int = 0
    is_open: bool = False
    is_ending: bool = False
    items: dict[str, WorkItem] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    active_at: float = 0.0

    def has_room(self) -> bool:
        """Returns whether another item may be sent."""
        return len(self.items) < self.max_items and (not self.items or sum(self.sizes.values()) < self.max_bytes)


class WorkQueue:
    """Thread-safe queue of work items, which knows when the last one is settled.

    Args:
        items: drawn one by one, as the windows of the streams allow, under the queue's lock.
        model: the weights that must answer; None accepts those of the first result.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        items: Iterator[WorkItem],
        *,
        model: ModelRef | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._items = items
        self._model = model
        self._changed = threading.Condition()
        self._requeued: deque[WorkItem] = deque()
        self._not_before = 0.0
        self._unsettled = 0
        """Items that were taken and have no final result."""
        self._is_exhausted = False

    @property
    def done(self) -> bool:
        """True when every item is settled."""
        with self._changed:
            return self._is_done()

    def open_window(self, max_items: int, max_bytes: int) -> Window:
        """Returns the empty window of a new stream."""
        return Window(max(1, max_items), max_bytes, is_open=True, active_at=self.clock())

    def take(self, window: Window) -> WorkItem | None:
        """Moves the next item into a window; blocks until there is one and the window has room.

        Returns:
            None when the window was closed or is ending, or every item is settled.
        """
        with self._changed:
            while window.is_open and not window.is_ending and not self._is_done():
                item = self._next_item() if window.has_room() else None
                if item is not None:
                    if not window.items:
                        window.active_at = self.clock()
                    window.items[item.item_id] = item
                    self._unsettled += 1
                    return item
                # Drawing the last item may have ended the job.
                if not self._is_done():
                    self._changed.wait(self._wait_s() if window.has_room() else None)
            return None

    def set_size(self, window: Window, item: WorkItem, size_bytes: int) -> bool:
        """Notes the encoded bytes of an item in flight; returns False when the window was closed meanwhile."""
        with self._changed:
            if window.is_open:
                window.sizes[item.item_id] = size_bytes
            return window.is_open

    def pop(self, window: Window, item_id: str) -> WorkItem | None:
        """Removes an item from a window; call `settle` or `put_back` for it next.

        Returns:
            None for an item that is not in flight there.
        """
        with self._changed:
            window.sizes.pop(item_id, None)
            return window.items.pop(item_id, None)

    def settle(self, again: Iterable[WorkItem] = (), after_s: float = 0.0) -> None:
        """Counts one popped item as settled.

        Args:
            again: parts of it that are to be sent again.
            after_s: least number of seconds until then.
        """
        with self._changed:
            self._unsettled -= 1
            parts = list(again)
            if parts:
                self._requeued.extend(parts)
                self._not_before = max(self._not_before, self.clock() + after_s)
            self._changed.notify_all()

    def put_back(self, item: WorkItem) -> None:
        """Returns a popped item to the front of the queue, without a result."""
        with self._changed:
            self._requeue([item])

    def close_window(self, window: Window) -> None:
        """Ends a window and puts its items back at the front of the queue. May be called more than once."""
        with self._changed:
            window.is_open = False
            self._requeue(window.items.values())
            window.items.clear()
            window.sizes.clear()

    def end_window(self, window: Window) -> None:
        """Lets a window take no further items. Those in flight stay there until they have results."""
        with self._changed:
            window.is_ending = True
            self._changed.notify_all()

    def in_flight(self, window: Window) -> int:
        """Returns the number of items in flight on a stream."""
        with self._changed:
            return len(window.items)

    def note_response(self, window: Window) -> None:
        """Restarts the clock of `silent_s`."""
        with self._changed:
            window.active_at = self.clock()

    def silent_s(self, window: Window) -> float:
        """Returns for how many seconds items have been in flight without a response; 0 when none are."""
        with self._changed:
            return self.clock() - window.active_at if window.items else 0.0

    def expect_model(self, model: ModelRef) -> ModelRef:
        """Returns the model that all results of the job must come from: the first one that was given."""
        with self._changed:
            self._model = self._model or model
            return self._model

    def _is_done(self) -> bool:
        return self._is_exhausted and not self._requeued and not self._unsettled

    def _next_item(self) -> WorkItem | None:
        if self._requeued and self.clock() >= self._not_before:
            return self._requeued.popleft()
        item = None if self._is_exhausted else next(self._items, None)
        if item is None and not self._is_exhausted:
            self._is_exhausted = True
            self._changed.notify_all()
        return item

    def _wait_s(self) -> float | None:
        return max(MIN_WAIT_S, self._not_before - self.clock()) if self._requeued else None

    def _requeue(self, items: Iterable[WorkItem]) -> None:
        back = list(items)
        self._unsettled -= len(back)
        self._requeued.extendleft(reversed(back))
        self._changed.notify_all()

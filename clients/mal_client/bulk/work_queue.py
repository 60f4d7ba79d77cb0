"""What is still to be sent of a bulk job, shared by the streams to all of its servers.

An item is waiting, on its way, or settled; a stream that breaks gives back what it had taken, so that another server
can take it up. One condition guards everything: the pool and the bookkeeping of its streams.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from mal_client.types import BoxXywh, ModelRef


@dataclass(frozen=True)
class WorkItem:
    """One image and some of its boxes; `boxes` by the caller's keys, `item_id` unique among what is on its way.

    Attributes:
        item_id: `KEY`, or `KEY.PART` for a part of an item that was split; parts may be split again. KEY is the
            caller's name and has no dot.
        boxes: by the caller's keys.
        resends: how often it was sent again on the server's word.
    """

    item_id: str
    boxes: dict[int, BoxXywh]
    resends: int = 0

    @property
    def key(self) -> str:
        """The caller's name for the item, the same for all of its parts."""
        return self.item_id.partition(".")[0]

    def split(self) -> list[WorkItem]:
        """Two parts with half of the boxes each."""
        keys = list(self.boxes)
        middle = len(keys) // 2
        return [
            replace(self, item_id=f"{self.item_id}.{part}", boxes={key: self.boxes[key] for key in half})
            for part, half in enumerate((keys[:middle], keys[middle:]))
        ]


@dataclass
class WorkQueue:
    """Items of a job. Hold `changed` round every call.

    Attributes:
        items: drawn as the windows of the streams allow.
        clock: monotonic seconds.
        model: which weights answer; the first answer settles it where it is None.
        changed: guards the pool and is notified whenever something in it changes.
    """

    items: Iterator[WorkItem]
    clock: Callable[[], float] = time.monotonic
    model: ModelRef | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)
    _again: deque[WorkItem] = field(default_factory=deque)
    _not_before: float = 0.0
    _on_their_way: int = 0
    _is_exhausted: bool = False

    @property
    def done(self) -> bool:
        """Everything is settled."""
        return self._is_exhausted and not self._again and not self._on_their_way

    def take(self) -> WorkItem | None:
        """An item to send now; None when there is none (see `wait_s`), or none any more (see `done`)."""
        if self._again and self.clock() >= self._not_before:
            self._on_their_way += 1
            return self._again.popleft()
        if not self._is_exhausted:
            item = next(self.items, None)
            if item is not None:
                self._on_their_way += 1
                return item
            self._is_exhausted = True
            self.changed.notify_all()
        return None

    def wait_s(self) -> float | None:
        """Seconds until something that waits may be sent; None when only a change can bring something."""
        return max(0.001, self._not_before - self.clock()) if self._again else None

    def settle(self) -> None:
        """One item on its way is answered, or failed for good."""
        self._on_their_way -= 1
        self.changed.notify_all()

    def give_back(self, items: Iterable[WorkItem]) -> None:
        """Items on their way that their stream will not answer; they come first."""
        back = list(items)
        self._on_their_way -= len(back)
        self._again.extendleft(reversed(back))
        self.changed.notify_all()

    def send_again(self, parts: Iterable[WorkItem], after_s: float = 0.0) -> None:
        """Adds items, to be sent after a while."""
        self._again.extend(parts)
        self._not_before = max(self._not_before, self.clock() + after_s)
        self.changed.notify_all()

    def unanswered(self) -> Iterator[WorkItem]:
        """What is left when the job is given up and no stream is open any more."""
        yield from self._again
        yield from self.items

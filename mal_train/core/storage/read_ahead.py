"""Reads items ahead in threads: parallel reads hide the latency of a store, memory stays bounded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

READERS: Final = 16
"""Threads that read remote files; requests of 50 ms each give 320 files/s."""
MAX_AHEAD: Final = 64
"""Items that are read before they are taken."""
MAX_AHEAD_BYTES: Final = 256 * 1024 * 1024
"""Bytes that are read and not yet taken, above which no further read begins."""

Item = TypeVar("Item")
Content = TypeVar("Content")


class ReadAhead(Generic[Item, Content]):
    """Iterator over items whose content is read ahead; `take` returns the content of an item. A context manager.

    Iterate in one thread at a time. `take` may be called in any thread and order, once for each item that was yielded;
    another call, or one after `close`, reads the item again. An item whose read has not begun is read by the thread
    that takes it, so that no limit can block it.

    Memory: at most `max_items` items and `max_bytes` bytes, and one item more for each reader that was reading when the
    limit was reached.

    Args:
        items: in the order in which they are needed; drawn in the thread that iterates.
        read: returns the content of an item; `take` raises its error.
        size_of: returns the bytes of a content.
        key_of: returns a unique key of an item.
        readers: number of threads, 1 or more.
        max_items: limit of the items ahead, 1 or more.
        max_bytes: limit of their bytes.
    """

    def __init__(
        self,
        items: Iterable[Item],
        read: Callable[[Item], Content],
        size_of: Callable[[Content], int],
        key_of: Callable[[Item], Hashable],
        *,
        readers: int = READERS,
        max_items: int = MAX_AHEAD,
        max_bytes: int = MAX_AHEAD_BYTES,
    ) -> None:
        self._items = iter(items)
        self._read = read
        self._size_of = size_of
        self._key_of = key_of
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._drawn: deque[Item] = deque()
        """Items that were drawn and not yet yielded."""
        self._waiting: dict[Hashable, Item] = {}
        """Items whose read has not begun, in order."""
        self._contents: dict[Hashable, Future[Content]] = {}
        """Of the items whose read has begun, until they are taken."""
        self._sizes: dict[Hashable, int] = {}
        self._is_closed = False
        self._threads = [threading.Thread(target=self._run, name="read-ahead", daemon=True) for _ in range(readers)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        """Returns the next item; its content may still be on its way."""
        self._draw()
        if not self._drawn:
            raise StopIteration
        return self._drawn.popleft()

    def take(self, item: Item) -> Content:
        """Returns the content of an item, waiting for it if need be. Raises the error of its read."""
        key = self._key_of(item)
        with self._changed:
            self._waiting.pop(key, None)
            future = self._contents.pop(key, None)
            self._sizes.pop(key, None)
            self._changed.notify_all()
        return self._read(item) if future is None else future.result()

    def close(self) -> None:
        """Ends the threads, each after the read that it is in; does not wait for them."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._contents.clear()
            self._sizes.clear()
            self._changed.notify_all()

    def held_bytes(self) -> int:
        """Returns the bytes that were read and not yet taken."""
        with self._changed:
            return sum(self._sizes.values())

    def _draw(self) -> None:
        while len(self._drawn) < self._max_items:
            item = next(self._items, None)
            if item is None:
                return
            self._drawn.append(item)
            with self._changed:
                self._waiting[self._key_of(item)] = item
                self._changed.notify()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            key, item, future = work
            try:
                content = self._read(item)
                size = self._size_of(content)
            except BaseException as error:
                # Of any kind: the thread that takes the item raises it.
                future.set_exception(error)
                continue
            with self._changed:
                if self._contents.get(key) is future:
                    self._sizes[key] = size
            future.set_result(content)

    def _next(self) -> tuple[Hashable, Item, Future[Content]] | None:
        with self._changed:
            while not self._is_closed and not self._may_read():
                self._changed.wait()
            if self._is_closed:
                return None
            key = next(iter(self._waiting))
            item = self._waiting.pop(key)
            future = self._contents[key] = Future[Content]()
            return key, item, future

    def _may_read(self) -> bool:
        return bool(self._waiting) and sum(self._sizes.values()) < self._max_bytes

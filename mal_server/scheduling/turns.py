"""A queue in which callers take turns. Pure; knows no priorities."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class TurnQueue(Generic[Item]):
    """Items of several callers, each in turn giving one (round robin); those of a caller go first come, first served.

    Every method takes the same time however many items wait.

    >>> queue = TurnQueue[str]()
    >>> for item in ("a1", "a2", "a3", "b1"):
    ...     queue.add(item, caller=item[0])
    >>> [queue.pop() for _ in range(4)]
    ['a1', 'b1', 'a2', 'a3']
    """

    def __init__(self) -> None:
        self._callers: OrderedDict[Item, Hashable] = OrderedDict()
        """Caller of each item, the oldest item first."""
        self._lines: OrderedDict[Hashable, OrderedDict[Item, None]] = OrderedDict()
        """Items of each caller, the caller whose turn it is first."""

    def __len__(self) -> int:
        return len(self._callers)

    def add(self, item: Item, caller: Hashable) -> None:
        """Appends an item."""
        self._callers[item] = caller
        self._lines.setdefault(caller, OrderedDict())[item] = None

    def oldest(self) -> Item:
        """Returns the item that was added first; the queue must not be empty."""
        return next(iter(self._callers))

    def first(self) -> Item:
        """Returns the item whose turn it is; the queue must not be empty."""
        return next(iter(next(iter(self._lines.values()))))

    def pop(self) -> Item:
        """Removes and returns the item whose turn it is; the queue must not be empty."""
        item = self.first()
        caller = self._callers[item]
        self.remove(item)
        if caller in self._lines:
            self._lines.move_to_end(caller)
        return item

    def remove(self, item: Item) -> None:
        """Removes an item if it is there."""
        if item in self._callers:
            caller = self._callers.pop(item)
            del self._lines[caller][item]
            if not self._lines[caller]:
                del self._lines[caller]

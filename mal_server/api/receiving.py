"""Bounds the request messages that are being received at once, and the time that each may take.

gRPC buffers an unfinished message up to the largest size, for as long as its sender likes, but only once the message is
read. Until then it holds the sender back (READ_AHEAD_BYTES). So a call reads its request only while it has a slot.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from mal_server.errors import ReceiveTimeout, TooManyCalls


def _itself(caller: str) -> str:
    """Returns the caller: it is a group of its own."""
    return caller


class ReceiveLimiter:
    """Slots for messages that are being received, shared fairly among callers.

    A caller gets at most half of the slots. Callers that wait take turns, each in the order of its calls. If too many
    calls wait, those of the group of callers with the most of them are refused, and in it those of one such caller.

    Args:
        slots: messages received at once.
        timeout_s: time for one message in seconds.
        contested_s: the same while others wait for a slot.
        max_waiting: calls that wait for a slot.
        group_of: group of a caller, for example its host; by default each caller is a group of its own.
    """

    def __init__(
        self,
        slots: int,
        *,
        timeout_s: float,
        contested_s: float,
        max_waiting: int,
        group_of: Callable[[str], str] = _itself,
    ) -> None:
        self._group_of = group_of
        self._free = slots
        self._share = max(1, slots // 2)
        self._timeout_s = timeout_s
        self._contested_s = min(contested_s, timeout_s)
        self._max_waiting = max_waiting
        self._held: Counter[str] = Counter()
        self._receiving: dict[asyncio.Timeout, float] = {}
        """Time limit of each message -> its start."""
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Calls of each caller that wait; the caller whose turn is next comes first."""

    async def receive(self, requests: AsyncIterator[Any], caller: str) -> Any:
        """Returns the next message of a call; None at the end of its messages.

        Raises:
            TooManyCalls: too many calls wait, and no other caller has more of them.
            ReceiveTimeout: the message did not arrive in time.
        """
        await self._acquire(caller)
        limit = asyncio.timeout(self._timeout_s)
        self._receiving[limit] = asyncio.get_running_loop().time()
        try:
            async with limit:
                self._shorten()
                return await anext(requests, None)
        except TimeoutError:
            raise ReceiveTimeout("the request did not arrive in time; send a smaller one, or send it faster") from None
        finally:
            del self._receiving[limit]
            self._release(caller)

    async def _acquire(self, caller: str) -> None:
        if self._free and self._held[caller] < self._share:
            self._take(caller)
            return
        if sum(map(len, self._waiting.values())) >= self._max_waiting:
            self._refuse_one(caller)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        self._shorten()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.exception() is None:
                self._release(caller)
            self._leave(caller, turn)
            raise

    def _refuse_one(self, caller: str) -> None:
        """Refuses one waiting call, or this one by raising: the newest of those who have the most, as groups.

        Where all have equally many, this one is refused: to take the place of another would not be fairer, and those
        who keep coming would take every place before its turn.
        """
        greediest = self._greediest(caller)
        error = TooManyCalls("too many calls are sending their requests; try again later")
        if greediest == caller:
            raise error
        turn = self._waiting[greediest][-1]
        self._leave(greediest, turn)
        if not turn.done():
            turn.set_exception(error)

    def _greediest(self, caller: str) -> str:
        """Returns who has the most calls in the group with the most; `caller`, whose new call counts, if none has more.

        Of several others it is the one whose turn is furthest.
        """
        calls = Counter({other: len(turns) for other, turns in self._waiting.items()})
        calls[caller] += 1
        of_group: Counter[str] = Counter()
        for other, count in calls.items():
            of_group[self._group_of(other)] += count
        group = _largest(of_group, self._group_of(caller))
        return _largest({other: calls[other] for other in calls if self._group_of(other) == group}, caller)

    def _take(self, caller: str) -> None:
        self._free -= 1
        self._held[caller] += 1

    def _release(self, caller: str) -> None:
        self._free += 1
        self._held[caller] -= 1
        if not self._held[caller]:
            del self._held[caller]
        while self._free:
            following = next((other for other in self._waiting if self._held[other] < self._share), None)
            if following is None:
                return
            turn = self._waiting[following][0]
            self._leave(following, turn)
            if turn.done():  # cancelled, and its call has not noticed yet
                continue
            self._take(following)
            turn.set_result(None)

    def _leave(self, caller: str, turn: "asyncio.Future[None]") -> None:
        """Takes a call out of the queue of its caller, whose turn it was then; does nothing if it is not there."""
        queue = self._waiting.get(caller, deque())
        if turn in queue:
            queue.remove(turn)
            self._waiting.move_to_end(caller)
        if not queue:
            self._waiting.pop(caller, None)

    def _shorten(self) -> None:
        """Shortens the time of the messages that are being received if a call waits."""
        if not self._waiting:
            return
        now = asyncio.get_running_loop().time()
        for limit, start in self._receiving.items():
            due = max(start + self._contested_s, now)
            when = limit.when()
            if when is not None and due < when:
                limit.reschedule(due)


def _largest(counts: Mapping[str, int], own: str) -> str:
    """Returns the name with the highest count: `own` if no other has more, else the last of those that have it."""
    return max(reversed(list(counts)), key=lambda name: (counts[name], name == own))

"""Slots for messages that are being received."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from mal_server.api.receiving import ReceiveLimiter
from mal_server.errors import ReceiveTimeout, TooManyCalls
from mal_server.security.caller import host_of


class Sender:
    """A call whose message arrives when the test says so."""

    def __init__(self, limiter: ReceiveLimiter, caller: str) -> None:
        self._arrived = asyncio.Event()
        self.is_reading = False
        self.receiving = asyncio.create_task(self._receive(limiter, caller))

    async def _receive(self, limiter: ReceiveLimiter, caller: str) -> Any:
        return await limiter.receive(self._messages(), caller)

    async def _messages(self) -> AsyncIterator[str]:
        self.is_reading = True
        await self._arrived.wait()
        yield "message"

    async def arrive(self) -> Any:
        self._arrived.set()
        return await self.receiving


def limiter(
    slots: int, *, timeout_s: float = 600.0, contested_s: float = 600.0, max_waiting: int = 9, **options: Any
) -> ReceiveLimiter:
    return ReceiveLimiter(slots, timeout_s=timeout_s, contested_s=contested_s, max_waiting=max_waiting, **options)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def test_a_call_waits_until_a_slot_is_free() -> None:
    async def work() -> None:
        slots = limiter(2)
        first, second, third = (Sender(slots, name) for name in ("a", "b", "c"))
        await settle()
        assert [first.is_reading, second.is_reading, third.is_reading] == [True, True, False]
        assert await first.arrive() == "message"
        await settle()
        assert third.is_reading
        await asyncio.gather(second.arrive(), third.arrive())

    run(work())


def test_one_caller_gets_half_of_the_slots_and_callers_take_turns() -> None:
    async def work() -> None:
        slots = limiter(4)
        greedy = [Sender(slots, "greedy") for _ in range(5)]
        await settle()
        other = [Sender(slots, "other") for _ in range(3)]
        await settle()
        assert [sender.is_reading for sender in greedy] == [True, True, False, False, False]
        assert [sender.is_reading for sender in other] == [True, True, False]
        await greedy[0].arrive()
        await settle()
        assert greedy[2].is_reading
        await other[0].arrive()
        await settle()
        assert other[2].is_reading
        for sender in (*greedy, *other):
            assert await sender.arrive() == "message"

    run(work())


def test_a_slow_sender_is_ended() -> None:
    async def work() -> None:
        slow = Sender(limiter(2, timeout_s=0.01), "a")
        with pytest.raises(ReceiveTimeout):
            await slow.receiving

    run(work())


def test_a_sender_has_less_time_while_others_wait() -> None:
    async def work() -> None:
        slots = limiter(1, contested_s=0.01)
        slow = Sender(slots, "a")
        await settle()
        waiting = Sender(slots, "b")
        with pytest.raises(ReceiveTimeout):
            await slow.receiving
        assert await waiting.arrive() == "message"

    run(work())


@pytest.mark.parametrize("is_holder_first", [False, True])
def test_cancelled_calls_give_their_slots_and_places_back(is_holder_first: bool) -> None:
    async def work() -> None:
        slots = limiter(1)
        holder, leaves, stays = Sender(slots, "a"), Sender(slots, "b"), Sender(slots, "c")
        await settle()
        for sender in (holder, leaves) if is_holder_first else (leaves, holder):
            sender.receiving.cancel()
        await settle()
        assert stays.is_reading
        assert await stays.arrive() == "message"
        after = Sender(slots, "d")
        assert await after.arrive() == "message"

    run(work())


def test_a_call_cancelled_as_its_turn_comes_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        slots = limiter(1)
        holder, leaves, stays = Sender(slots, "a"), Sender(slots, "b"), Sender(slots, "c")
        await settle()
        release = slots._release

        def release_and_cancel(caller: str) -> None:  # before the call that has the turn now can run
            release(caller)
            leaves.receiving.cancel()

        monkeypatch.setattr(slots, "_release", release_and_cancel)
        await holder.arrive()
        await settle()
        assert leaves.receiving.cancelled()
        assert not leaves.is_reading
        assert await stays.arrive() == "message"

    run(work())


def test_a_call_too_many_in_the_queue_is_refused() -> None:
    async def work() -> None:
        slots = limiter(1, max_waiting=1)
        senders = [Sender(slots, "a") for _ in range(3)]
        with pytest.raises(TooManyCalls):
            await senders[2].receiving
        for sender in senders[:2]:
            assert await sender.arrive() == "message"

    run(work())


def test_a_full_queue_refuses_a_call_of_the_caller_with_the_most() -> None:
    async def work() -> None:
        slots = limiter(2, max_waiting=2)
        holders = [Sender(slots, name) for name in ("greedy", "another")]
        greedy = [Sender(slots, "greedy") for _ in range(2)]
        await settle()
        first = Sender(slots, "first")
        with pytest.raises(TooManyCalls):
            await greedy[1].receiving
        again = Sender(slots, "first")  # no other caller has more waiting calls
        with pytest.raises(TooManyCalls):
            await again.receiving
        for sender in (*holders, greedy[0], first):
            assert await sender.arrive() == "message"

    run(work())


def test_callers_of_one_host_refuse_no_call_of_another() -> None:
    async def work() -> None:
        slots = limiter(2, max_waiting=4, group_of=host_of)
        holders = [Sender(slots, f"ipv4:192.0.2.9:{port}") for port in (1, 2)]
        strangers = [Sender(slots, f"ipv4:192.0.2.9:{port}") for port in range(3, 9)]
        await settle()
        for stranger in strangers[4:]:  # as many wait as may
            with pytest.raises(TooManyCalls):
                await stranger.receiving
        probe = Sender(slots, "ipv4:127.0.0.1:1")
        more = [Sender(slots, f"ipv4:192.0.2.9:{port}") for port in range(10, 14)]
        for stranger in (strangers[3], *more):
            with pytest.raises(TooManyCalls):
                await stranger.receiving
        for sender in (*holders, *strangers[:3], probe):
            assert await sender.arrive() == "message"

    run(work())


def test_newcomers_take_no_place_of_those_who_wait_with_as_few_calls() -> None:
    async def work() -> None:
        slots = limiter(2, max_waiting=2)
        holders = [Sender(slots, name) for name in ("a", "b")]
        waiting = [Sender(slots, name) for name in ("c", "d")]
        await settle()
        for name in ("e", "f", "g"):
            with pytest.raises(TooManyCalls):
                await Sender(slots, name).receiving
        for sender in (*holders, *waiting):
            assert await sender.arrive() == "message"

    run(work())


def test_a_call_cancelled_as_it_is_refused_gives_no_slot_back() -> None:
    async def work() -> None:
        slots = limiter(1, max_waiting=2)
        holder = Sender(slots, "holder")
        greedy = [Sender(slots, "greedy") for _ in range(2)]
        await settle()
        other = Sender(slots, "other")
        other.receiving.get_loop().call_soon(greedy[1].receiving.cancel)  # after `other` has begun, before it notices
        await settle()
        assert greedy[1].receiving.cancelled()
        assert not greedy[0].is_reading
        for sender in (holder, greedy[0], other):
            assert await sender.arrive() == "message"

    run(work())


def test_the_end_of_the_messages_is_none() -> None:
    async def nothing() -> AsyncIterator[str]:
        for message in list[str]():
            yield message

    async def work() -> None:
        assert await limiter(1).receive(nothing(), "a") is None

    run(work())

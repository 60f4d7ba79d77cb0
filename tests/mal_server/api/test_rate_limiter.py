"""Callers that send one call after another are refused at a limited rate; those with a token do not wait for it."""

import asyncio
import time
from typing import Any

import grpc
import pytest

from mal_server.api.rate_limiter import MAX_DELAY_S, RateLimiter
from tests.mal_server.calls import with_server
from tests.mal_server.fakes import DISC_BOX, Running, label_request, run_on_fake_clock

TOKEN = "a" * 32
PATHS = ("/mal.v1.LabelingService/LabelImage", "/mal.v1.ModelService/ListModels", "/made/up")


def limiter(per_s: float, burst: int, max_waiting: int = 100) -> RateLimiter:
    return RateLimiter(per_s, burst=burst, max_waiting=max_waiting, clock=asyncio.get_running_loop().time)


async def seconds(limited: RateLimiter) -> float:
    """Returns the time of an event after it arrived."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await limited.acquire()
    return loop.time() - begun


def test_events_above_a_burst_are_as_fast_as_the_rate() -> None:
    async def work() -> None:
        limited, loop = limiter(10, burst=5), asyncio.get_running_loop()
        begun = loop.time()
        for _ in range(25):
            await limited.acquire()
        assert loop.time() - begun == pytest.approx(2.0, abs=0.11)
        await asyncio.sleep(10)
        assert [await seconds(limited) for _ in range(5)] == [0.0] * 5

    run_on_fake_clock(work())


def test_no_event_waits_long_and_only_so_many_wait() -> None:
    async def work() -> None:
        limited = limiter(10, burst=1, max_waiting=20)
        waited = await asyncio.gather(*(seconds(limited) for _ in range(200)))
        assert max(waited) == pytest.approx(MAX_DELAY_S, abs=0.11)
        assert sum(one > 0 for one in waited) == 20
        assert await seconds(limited) <= MAX_DELAY_S

    run_on_fake_clock(work())


def test_a_cancelled_event_leaves_its_place() -> None:
    async def work() -> None:
        limited = limiter(1, burst=1, max_waiting=1)
        await limited.acquire()
        waiting = asyncio.create_task(limited.acquire())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await seconds(limited) > 0

    run_on_fake_clock(work())


@pytest.mark.parametrize("path", PATHS)
def test_calls_without_a_token_are_refused_at_a_limited_rate(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_server.api.interceptors.REFUSALS_PER_S", 20.0)
    monkeypatch.setenv("MAL_TEST_TOKEN", TOKEN)

    async def refused(running: Running) -> grpc.StatusCode:
        channel: Any = running.channel
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary(path)(b"")
        return raised.value.code()

    async def work(running: Running) -> float:
        begun = time.monotonic()
        assert {await refused(running) for _ in range(30)} == {grpc.StatusCode.UNAUTHENTICATED}
        return time.monotonic() - begun

    tokens = [{"name": "a", "token": "env:MAL_TEST_TOKEN", "scopes": ["label"]}]
    assert with_server(work, tokens=tokens) >= 0.4


def test_callers_with_a_token_do_not_wait_behind_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forever(_: RateLimiter) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(RateLimiter, "acquire", forever)
    monkeypatch.setenv("MAL_TEST_TOKEN", TOKEN)
    metadata = (("authorization", f"Bearer {TOKEN}"),)

    async def work(running: Running) -> int:
        call = running.labeling.LabelImage(label_request(DISC_BOX), metadata=metadata)
        return len([result async for response in call for result in response.results])

    tokens = [{"name": "a", "token": "env:MAL_TEST_TOKEN", "scopes": ["label"]}]
    assert with_server(work, tokens=tokens) == 1

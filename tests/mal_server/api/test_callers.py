"""The caller that queues know: the name of the token, or without tokens the connection."""

import asyncio
from typing import Any

import grpc
import pytest
from mal.v1 import labeling_pb2_grpc

from mal_server.scheduling.batcher import Batcher
from mal_server.scheduling.cpu_pool import PriorityThreadPool
from mal_server.scheduling.priority import Priority
from tests.mal_server.calls import bulk, collect, items
from tests.mal_server.evaluation.test_run import evaluate, options_of, scenes
from tests.mal_server.fakes import DISC_BOX, Running, label_request, serving


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Priority, str]]:
    """Returns a list that receives priority and caller of each request that is admitted."""
    found: list[tuple[Priority, str]] = []
    admit = Batcher.admit

    def recorded(batcher: Any, count: int, **options: Any) -> Any:
        found.append((options["priority"], options["caller"]))
        return admit(batcher, count, **options)

    monkeypatch.setattr(Batcher, "admit", recorded)
    return found


def test_a_token_is_one_caller_on_every_connection_and_in_every_rpc(
    callers: list[tuple[Priority, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAL_TEST_A", "a-0123456789abcdef")
    monkeypatch.setenv("MAL_TEST_B", "b-0123456789abcdef")
    tokens = [{"name": name, "token": f"env:MAL_TEST_{name}", "scopes": ["label"]} for name in "AB"]

    async def call(running: Running, name: str) -> None:
        metadata = (("authorization", f"Bearer {name.lower()}-0123456789abcdef"),)
        async with grpc.aio.insecure_channel(running.server.address) as channel:
            stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
            await collect(stub.LabelImage(label_request(DISC_BOX), metadata=metadata))
            await collect(stub.LabelImages(items(label_request(DISC_BOX)), metadata=metadata))

    async def work() -> None:
        async with serving(tokens=tokens) as running:
            for name in "ABA":
                await call(running, name)

    asyncio.run(work())
    assert callers == [(priority, name) for name in "ABA" for priority in Priority]


def test_an_evaluation_takes_its_turns_for_threads_as_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    submit = PriorityThreadPool.submit

    def recorded(pool: Any, priority: Priority, work: Any, *args: Any, caller: Any = "") -> Any:
        found.append(caller)
        return submit(pool, priority, work, *args, caller=caller)

    monkeypatch.setattr(PriorityThreadPool, "submit", recorded)
    assert evaluate(options_of(), *scenes())[1].images == 6
    assert len(found) > 6
    assert len(set(found)) == 1
    assert found[0]


def test_without_tokens_a_connection_is_one_caller(callers: list[tuple[Priority, str]]) -> None:
    async def work() -> None:
        async with serving() as running:
            for _ in range(2):
                await bulk(running, label_request(DISC_BOX))
            options = (("grpc.use_local_subchannel_pool", 1),)
            async with grpc.aio.insecure_channel(running.server.address, options=options) as channel:
                stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
                await collect(stub.LabelImage(label_request(DISC_BOX)))

    asyncio.run(work())
    (first, second, other) = (caller for _, caller in callers)
    assert first == second
    assert first
    assert other not in ("", first)

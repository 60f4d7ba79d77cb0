"""Streams of revoked tokens, idle streams, and limits of open calls."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from mal.v1 import evaluation_pb2, labeling_pb2, model_pb2

from tests.mal_server.api.test_streams import LargeMasks
from tests.mal_server.calls import reason_of, status_details, until
from tests.mal_server.fakes import DISC_BOX, BrightPredictor, Running, label, label_request, serving
from tests.mal_server.raw_http2 import RawConnection, message

OLD, NEW, OTHER = (f"{name}-0123456789abcdef" for name in ("old", "new", "other"))


class Stream:
    """A LabelImages stream that the test feeds item by item."""

    def __init__(self, running: Running, token: str = "") -> None:
        self._items: asyncio.Queue[labeling_pb2.LabelImagesRequest | None] = asyncio.Queue()
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.call = running.labeling.LabelImages(self._requests(), metadata=metadata)

    async def _requests(self) -> AsyncIterator[labeling_pb2.LabelImagesRequest]:
        while (item := await self._items.get()) is not None:
            yield item

    def send(self) -> None:
        self._items.put_nowait(labeling_pb2.LabelImagesRequest(item_id="1", request=label_request(DISC_BOX)))

    async def label(self) -> int:
        self.send()
        response = await self.call.read()
        return len(response.response.results)

    async def end(self) -> None:
        self._items.put_nowait(None)
        assert not await self.call.read()

    async def error(self) -> tuple[grpc.StatusCode, str]:
        """Returns code and reason with which the server ends the stream."""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.call.read()
        return raised.value.code(), reason_of(status_details(raised.value))


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(OLD)
    return path


def settings(token_file: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "other").write_text(OTHER)
    return {
        "tokens": [
            {"name": "a", "token": f"file:{token_file}", "scopes": ["label", "evaluate"]},
            {"name": "b", "token": f"file:{tmp_path / 'other'}", "scopes": ["label"]},
        ]
    }


def test_a_revoked_token_ends_its_streams_and_no_others(token_file: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(**settings(token_file, tmp_path)) as running:
            revoked, kept = Stream(running, OLD), Stream(running, OTHER)
            assert await revoked.label() == await kept.label() == 1
            token_file.write_text(NEW)
            assert await running.server.reload_tokens()
            assert await revoked.error() == (grpc.StatusCode.UNAUTHENTICATED, "NO_TOKEN")
            assert await kept.label() == 1
            await kept.end()
            assert running.server.running_calls == 0

    asyncio.run(work())


def test_a_revoked_token_ends_a_call_whose_work_still_runs(token_file: Path, tmp_path: Path) -> None:
    gate = threading.Event()

    async def work() -> None:
        async with serving(BrightPredictor(gate=gate), **settings(token_file, tmp_path)) as running:
            stream = Stream(running, OLD)
            stream.send()
            await until(lambda: running.predictor.batches)
            token_file.write_text(NEW)
            await running.server.reload_tokens()
            assert await stream.error() == (grpc.StatusCode.UNAUTHENTICATED, "NO_TOKEN")
            gate.set()

    asyncio.run(work())


def test_a_token_that_lost_a_scope_ends_the_streams_that_need_it(token_file: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(**settings(token_file, tmp_path)) as running:
            stream = Stream(running, OLD)
            assert await stream.label() == 1
            first, *others = running.server.config.tokens
            fewer = first.model_copy(update={"scopes": ("evaluate",)})
            await running.server.reload_tokens((fewer, *others))
            assert await stream.error() == (grpc.StatusCode.PERMISSION_DENIED, "MISSING_SCOPE")

    asyncio.run(work())


IDLE = {"stream_idle_s": 0.2}


def test_an_idle_stream_ends_and_releases_its_model() -> None:
    async def work() -> None:
        async with serving(connections=IDLE) as running:
            stream = Stream(running)
            assert await stream.label() == 1
            assert await stream.error() == (grpc.StatusCode.UNAVAILABLE, "STREAM_IDLE")
            (model,) = (await running.model.ListModels(model_pb2.ListModelsRequest())).models
            assert model.calls == 0

    asyncio.run(work())


def test_a_stream_with_work_in_flight_is_not_idle() -> None:
    gate = threading.Event()

    async def work() -> None:
        async with serving(BrightPredictor(gate=gate), connections=IDLE) as running:
            busy, idle = Stream(running), Stream(running)
            busy.send()
            await until(lambda: running.predictor.batches)
            assert (await idle.error())[1] == "STREAM_IDLE"  # so the time has passed for both
            gate.set()
            assert len((await busy.call.read()).response.results) == 1
            busy.call.cancel()

    asyncio.run(work())


def test_an_evaluation_that_sends_nothing_ends() -> None:
    async def work() -> None:
        async def silence() -> AsyncIterator[evaluation_pb2.EvaluateRequest]:
            await asyncio.Event().wait()
            yield evaluation_pb2.EvaluateRequest()

        async with serving(connections=IDLE) as running:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await running.evaluation.Evaluate(silence()).read()
            assert reason_of(status_details(raised.value)) == "STREAM_IDLE"

    asyncio.run(work())


def test_a_client_that_does_not_read_its_responses_releases_the_model() -> None:
    async def work() -> None:
        async with serving(LargeMasks(), connections=IDLE) as running:
            connection = await RawConnection.open(running.server.address)  # it grants no more than HTTP/2's 64 KiB
            connection.call(1, b"/mal.v1.LabelingService/LabelImages")
            item = labeling_pb2.LabelImagesRequest(item_id="1", request=label_request(DISC_BOX))
            await connection.send(1, message(item.SerializeToString()))
            await until(lambda: running.predictor.batches)
            await until(lambda: running.server.running_calls == 0)
            (model,) = (await running.model.ListModels(model_pb2.ListModelsRequest())).models
            assert model.calls == 0
            await connection.close()

    asyncio.run(work())


def test_one_stream_too_many_is_refused_and_a_closed_one_makes_room() -> None:
    async def work() -> None:
        async with serving(connections={"max_streams": 2}) as running:
            first, second = Stream(running), Stream(running)
            assert await first.label() == await second.label() == 1
            assert await Stream(running).error() == (grpc.StatusCode.UNAVAILABLE, "TOO_MANY_STREAMS")
            assert len(await label(running, label_request(DISC_BOX))) == 1
            await first.end()
            third = Stream(running)
            assert await third.label() == 1
            await asyncio.gather(second.end(), third.end())

    asyncio.run(work())


def test_a_token_has_a_limit_of_streams_of_its_own(token_file: Path, tmp_path: Path) -> None:
    async def work() -> None:
        connections = {"max_streams_per_token": 1}
        async with serving(connections=connections, **settings(token_file, tmp_path)) as running:
            first = Stream(running, OLD)
            assert await first.label() == 1
            assert (await Stream(running, OLD).error())[1] == "TOO_MANY_STREAMS"
            other = Stream(running, OTHER)
            assert await other.label() == 1
            await asyncio.gather(first.end(), other.end())

    asyncio.run(work())


def test_one_call_too_many_is_refused() -> None:
    async def work() -> None:
        async with serving(connections={"max_calls": 1}) as running:
            stream = Stream(running)
            assert await stream.label() == 1
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await label(running, label_request(DISC_BOX))
            assert reason_of(status_details(raised.value)) == "TOO_MANY_CALLS"
            await stream.end()
            assert len(await label(running, label_request(DISC_BOX))) == 1

    asyncio.run(work())


def test_one_token_runs_half_of_the_calls(token_file: Path, tmp_path: Path) -> None:
    gate = threading.Event()

    def call(running: Running, token: str) -> Any:
        metadata = (("authorization", f"Bearer {token}"),)
        return running.labeling.LabelImage(label_request(DISC_BOX), metadata=metadata)

    async def work() -> None:
        settings_ = {"connections": {"max_calls": 5}, **settings(token_file, tmp_path)}
        async with serving(BrightPredictor(gate=gate), **settings_) as running:
            greedy = [call(running, OLD) for _ in range(2)]
            await until(lambda: running.server.running_calls == 2)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(running, OLD).read()
            assert reason_of(status_details(raised.value)) == "TOO_MANY_CALLS"
            other = call(running, OTHER)
            await until(lambda: running.server.running_calls == 3)
            gate.set()
            for one in (*greedy, other):
                assert len((await one.read()).results) == 1
            await until(lambda: running.server.running_calls == 0)
            assert len((await call(running, OLD).read()).results) == 1

    asyncio.run(work())

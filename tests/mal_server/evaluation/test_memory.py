"""Memory that evaluations share: which bytes count, which evaluation fails when it is full, and how long it is held."""

import asyncio
import json
import math
import threading
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from mal.v1 import evaluation_pb2

from mal_server.api.serialization.evaluation_messages import read_evaluate_options, read_records
from mal_server.api.serialization.labeling_messages import CallDefaults
from mal_server.errors import MemoryFull
from mal_server.evaluation.dataset_reader import Dataset, memory_of, read_dataset
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.scheduling.memory_quota import MemoryQuota, Reservation
from mal_server.scheduling.priority import Priority
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.core.settings import Branch
from tests.mal_server.calls import reason_of, status_details
from tests.mal_server.evaluation.served_datasets import (
    Request,
    data_folders,
    each,
    on_server,
    run_evaluation,
    write_dataset,
)
from tests.mal_server.evaluation.test_run import SCENES, options_of, scenes
from tests.mal_server.fakes import BrightPredictor, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "sets")


def test_an_evaluation_without_memory_is_refused_with_a_time_to_retry(folder: Path) -> None:
    """The first evaluation holds a data set; the second one fits only after it."""
    gate = threading.Event()
    text = (folder / "truth.json").read_text()
    (folder / "truth.json").write_text(text + " " * (2**17 - len(text)))

    async def work() -> tuple[str, bool, int]:
        async with serving(BrightPredictor(gate=gate), max_evaluation_bytes=2**20, **data_folders(folder)) as running:
            first = asyncio.create_task(run_evaluation(running, [on_server()]))
            while not running.predictor.batches:
                await asyncio.sleep(0.001)
            with pytest.raises(grpc.aio.AioRpcError, match="max_evaluation_bytes") as raised:
                await run_evaluation(running, [on_server()])
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            trailers: Any = raised.value.trailing_metadata()
            pushback = dict(trailers).get("grpc-retry-pushback-ms")
            gate.set()
            await first
            _, second = await run_evaluation(running, [on_server()])
            return reason_of(status_details(raised.value)), bool(pushback), second.images

    assert asyncio.run(work()) == ("MEMORY_FULL", True, 6)


def test_measured_images_count_as_memory_and_the_refused_evaluation_succeeds_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mal_train.core.metrics.evaluator.MEMORY_OF_A_PAIR", 2**20)
    over = asyncio.Event()

    async def messages_until_over(messages: Sequence[Request]) -> AsyncIterator[Request]:
        for message in messages:
            yield message
        await over.wait()

    async def work() -> tuple[str, int, int]:
        async with serving(max_evaluation_bytes=2**20) as running:
            first = aiter(running.evaluation.Evaluate(messages_until_over([options_of(), scenes()[0]])))
            await anext(first)  # the first image is measured
            with pytest.raises(grpc.aio.AioRpcError, match="max_evaluation_bytes") as raised:
                await run_evaluation(running, [options_of(), *scenes()])
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            over.set()
            rest = [response async for response in first]
            _, second = await run_evaluation(running, [options_of(), *scenes()])
            return reason_of(status_details(raised.value)), rest[-1].result.images, second.images

    assert asyncio.run(asyncio.wait_for(work(), 60)) == ("MEMORY_FULL", 1, len(SCENES))


def test_a_data_set_that_a_thread_still_reads_counts_after_its_call_is_cancelled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, gate, over = threading.Event(), threading.Event(), threading.Event()
    leave = Reservation.__exit__

    def slow(*args: Any) -> Dataset:
        started.set()
        gate.wait(30)
        return read_dataset(*args)

    def left(share: Reservation, *error: Any) -> None:
        leave(share, *error)
        over.set()

    async def fits(running: Any) -> bool:
        try:
            return bool((await run_evaluation(running, [on_server()]))[1].images)
        except grpc.aio.AioRpcError as error:
            if reason_of(status_details(error)) != "MEMORY_FULL":
                raise
            return False

    async def work() -> None:
        async with serving(max_evaluation_bytes=2**20, **data_folders(folder)) as running:
            gone = asyncio.create_task(run_evaluation(running, [on_server()]))
            while not started.is_set():
                await asyncio.sleep(0.001)
            gone.cancel()
            while not over.is_set():
                await asyncio.sleep(0.001)
            try:
                assert not await fits(running)
            finally:
                gate.set()
            while not await fits(running):
                await asyncio.sleep(0.001)

    text = (folder / "truth.json").read_text()
    (folder / "truth.json").write_text(text + " " * (2**17 - len(text)))
    monkeypatch.setattr("mal_server.api.service.read_dataset", slow)
    monkeypatch.setattr(Reservation, "__exit__", left)
    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_missing_data_set_is_reported_before_its_records_are_read(folder: Path) -> None:
    """The client is still sending when the error arrives."""

    async def work() -> str:
        failed = asyncio.Event()

        async def messages() -> AsyncIterator[Request]:
            yield on_server("sets/none.json")
            await failed.wait()

        async with serving(**data_folders(folder)) as running:
            try:
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await asyncio.wait_for(anext(aiter(running.evaluation.Evaluate(messages()))), 30)
            finally:
                failed.set()
            return reason_of(status_details(raised.value))

    assert asyncio.run(work()) == "FILE_NOT_FOUND"


def test_a_data_set_of_short_rows_takes_no_more_memory_than_estimated(tmp_path: Path) -> None:
    ids = range(3000)
    triangle = {"category_id": 1, "bbox": [1, 1, 8, 8], "segmentation": [[1, 1, 9, 1, 9, 9]]}
    images = [{"id": n, "file_name": f"{n}.png"} for n in ids[:300]]
    rows = [{"id": n, "image_id": n // 10, **triangle} for n in ids]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "truth.json").write_text(json.dumps(content, separators=(",", ":")))
    folders = AllowedDirs({"sets": tmp_path}, "data_folders")
    options = read_evaluate_options(on_server(), CallDefaults(Branch.STUDENT, Priority.BATCH, math.inf))
    tracemalloc.start()
    try:
        truths = list(read_dataset(folders, "sets/truth.json", "sets").ground_truths(options.label_request, 10, {}))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(truths) == 300
    assert peak <= memory_of(folders, "sets/truth.json")


def test_records_count_as_memory_as_they_arrive() -> None:
    budget = MemoryQuota(10, "max_evaluation_bytes")
    options = read_evaluate_options(
        on_server(resume_token=b"t"), CallDefaults(Branch.STUDENT, Priority.BATCH, math.inf)
    )
    messages = [Request(image=evaluation_pb2.EvaluateImage(item_id=str(index), record=b"123")) for index in range(4)]
    with budget.reserve() as alone:
        # 16 bytes: a single evaluation may exceed the quota.
        assert len(asyncio.run(read_records(each(messages), options, alone.grow))) == 4
        with budget.reserve() as late, pytest.raises(MemoryFull, match="16 of 10 bytes"):
            asyncio.run(read_records(each(messages), options, late.grow))
        assert budget.used == 16
    with budget.reserve() as one, budget.reserve() as other:
        one.grow(4)
        with pytest.raises(MemoryFull, match="needs 8"):
            asyncio.run(read_records(each(messages), options, other.grow))
        assert budget.used == 8
    assert budget.used == 0


def test_of_two_evaluations_that_fill_the_memory_the_later_one_fails() -> None:
    budget = MemoryQuota(10, "max_evaluation_bytes")
    with budget.reserve() as first, budget.reserve() as later:
        first.grow(6)
        later.grow(4)
        first.grow(1)
        with pytest.raises(MemoryFull, match="7 of 10 bytes"):
            later.grow(1)
    assert budget.used == 0
    with budget.reserve() as next_one:
        next_one.grow(11)
        assert budget.used == 11


def test_memory_is_held_while_a_thread_computes_the_report_of_a_cancelled_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started, gate, over = threading.Event(), threading.Event(), threading.Event()
    budgets: list[MemoryQuota] = []
    leave = Reservation.__exit__

    def made(*args: Any) -> MemoryQuota:
        budgets.append(MemoryQuota(*args))
        return budgets[-1]

    def report(self: Evaluator) -> None:
        started.set()
        assert gate.wait(60)

    def left(self: Reservation, *args: Any) -> None:
        leave(self, *args)
        over.set()

    monkeypatch.setattr("mal_server.api.service.MemoryQuota", made)
    monkeypatch.setattr(Evaluator, "report", report)
    monkeypatch.setattr(Reservation, "__exit__", left)

    async def work() -> None:
        async with serving() as running:
            call = asyncio.create_task(run_evaluation(running, [options_of(), *scenes()[:1]]))
            assert await asyncio.to_thread(started.wait, 60)
            call.cancel()
            assert await asyncio.to_thread(over.wait, 60)
            assert budgets[0].used > 0
            gate.set()
            while budgets[0].used:
                await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(work(), 60))

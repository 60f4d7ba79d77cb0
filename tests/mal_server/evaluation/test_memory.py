"""Memory that evaluations share: which bytes count, which evaluation fails when it is full, and how long it is held."""

import asyncio
import gc
import json
import math
import threading
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from mal.v1 import evaluation_pb2, types_pb2

from mal_server.api.serialization.evaluation_messages import (
    MEMORY_OF_A_RECORD,
    read_evaluate_options,
    read_ground_truth,
    read_images,
    read_records,
)
from mal_server.api.serialization.labeling_messages import CallDefaults
from mal_server.config.limits import MAX_CATEGORIES, Limits
from mal_server.errors import CallTooLarge, MemoryFull
from mal_server.evaluation.dataset_reader import MAX_ROW_CHARS, Dataset, memory_of, read_dataset
from mal_server.evaluation.resume_tokens import GroundTruth
from mal_server.evaluation.run import MEMORY_OF_AN_OBJECT
from mal_server.inference.allowed_dirs import AllowedDirs
from mal_server.scheduling.memory_quota import MemoryQuota, Reservation
from mal_server.scheduling.priority import Priority
from mal_train.core.masks.rle import Rle
from mal_train.core.metrics.evaluator import memory_of as memory_of_results
from mal_train.core.settings import Branch
from mal_train.core.threads import clear_in_parts
from tests.mal_server.calls import collect, fields_of, reason_of, status_details
from tests.mal_server.evaluation.served_datasets import (
    Request,
    data_folders,
    each,
    on_server,
    run_evaluation,
    write_dataset,
)
from tests.mal_server.evaluation.test_run import SCENES, evaluate, message_of, options_of, scenes, truth_of
from tests.mal_server.fakes import BrightPredictor, encoded, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "sets")


QUOTA = 2**20


def enlarge(file: Path) -> None:
    """Lengthens a data set so that one fits into QUOTA while it is read, and two do not."""
    spaces = int(0.3 * QUOTA)
    file.write_text(file.read_text() + " " * spaces)
    assert 0.5 * QUOTA < memory_of(AllowedDirs({"sets": file.parent}, "data_folders"), f"sets/{file.name}") < QUOTA


def test_an_evaluation_without_memory_is_refused_with_a_time_to_retry(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first evaluation holds the objects of an image; the second one fits only after it."""
    gate = threading.Event()
    enlarge(folder / "truth.json")
    monkeypatch.setattr("mal_server.evaluation.run.MEMORY_OF_AN_OBJECT", QUOTA // 6)
    settings: dict[str, Any] = {"max_evaluation_bytes": QUOTA, "limits": {"max_items_in_flight": 1}}

    async def work() -> tuple[str, bool, int]:
        async with serving(BrightPredictor(gate=gate), **settings, **data_folders(folder)) as running:
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
    monkeypatch.setattr("mal_train.core.metrics.evaluator.MEMORY_OF_A_PAIR", QUOTA // 24)
    over = asyncio.Event()

    async def messages_until_over(messages: Sequence[Request]) -> AsyncIterator[Request]:
        for message in messages:
            yield message
        await over.wait()

    async def work() -> tuple[str, int, int]:
        async with serving(max_evaluation_bytes=QUOTA, limits={"max_items_in_flight": 1}) as running:
            first = aiter(running.evaluation.Evaluate(messages_until_over([options_of(), *scenes()[:3]])))
            for _ in range(3):
                await anext(first)  # an image is measured
            with pytest.raises(grpc.aio.AioRpcError, match="max_evaluation_bytes") as raised:
                await run_evaluation(running, [options_of(), *scenes()])
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            over.set()
            rest = [response async for response in first]
            _, second = await run_evaluation(running, [options_of(), *scenes()])
            return reason_of(status_details(raised.value)), rest[-1].result.images, second.images

    assert asyncio.run(asyncio.wait_for(work(), 60)) == ("MEMORY_FULL", 3, len(SCENES))


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
        async with serving(max_evaluation_bytes=QUOTA, **data_folders(folder)) as running:
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

    enlarge(folder / "truth.json")
    monkeypatch.setattr("mal_server.api.service.read_dataset", slow)
    monkeypatch.setattr(Reservation, "__exit__", left)
    asyncio.run(asyncio.wait_for(work(), 60))


def test_data_sets_are_read_one_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, reading, most, sized = threading.Lock(), 0, 0, 0
    gate = threading.Event()

    def counted(*args: Any) -> int:
        nonlocal sized
        sized += 1
        return memory_of(*args)

    def slow(*args: Any) -> Dataset:
        nonlocal reading, most
        with lock:
            reading += 1
            most = max(most, reading)
        gate.wait(60)
        dataset = read_dataset(*args)
        with lock:
            reading -= 1
        return dataset

    async def work() -> list[int]:
        async with serving(**data_folders(folder)) as running:
            calls = [asyncio.create_task(run_evaluation(running, [on_server()])) for _ in range(3)]
            while sized < 3:  # each call reads its data set next
                await asyncio.sleep(0.001)
            for _ in range(20):
                await asyncio.sleep(0.001)
            calls[0].cancel()  # its thread goes on, and the next one waits for it
            gate.set()
            return [result.images for _, result in await asyncio.gather(*calls[1:])]

    monkeypatch.setattr("mal_server.api.service.memory_of", counted)
    monkeypatch.setattr("mal_server.api.service.read_dataset", slow)
    assert asyncio.run(asyncio.wait_for(work(), 60)) == [6, 6]
    assert most == 1


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


TRIANGLE = '"category_id":1,"bbox":[1,1,8,8],"segmentation":[[1,1,9,1,9,9]]'
IMAGES = [f'{{"id":{n},"file_name":"{n}.png"}}' for n in range(400)]
SHORT_ROWS = {
    "triangles": (IMAGES, [f'{{"id":{n},"image_id":{n // 10},{TRIANGLE}}}' for n in range(4000)]),
    "rows without an id": (IMAGES, ['{"image_id":1}'] * 4000),
    "images": ([f'{{"id":{n},"file_name":"a"}}' for n in range(4000)], []),
    "images without a name": ([f'{{"id":{n}}}' for n in range(4000)], []),
    "images without an id": (["{}"] * 4000, []),
}


@pytest.mark.parametrize("name", SHORT_ROWS)
def test_a_data_set_of_short_rows_takes_no_more_memory_than_estimated(name: str, tmp_path: Path) -> None:
    images, rows = SHORT_ROWS[name]
    text = f'{{"images":[{",".join(images)}],"annotations":[{",".join(rows)}],"categories":[{{"id":1}}]}}'
    (tmp_path / "truth.json").write_text(text)
    folders = AllowedDirs({"sets": tmp_path}, "data_folders")
    tracemalloc.start()
    try:
        dataset = read_dataset(folders, "sets/truth.json", "sets")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= memory_of(folders, "sets/truth.json")
    assert kept <= dataset.memory


def test_rows_of_a_data_set_are_nothing_to_the_garbage_collector(tmp_path: Path) -> None:
    """A collection stops all threads for about 0.3 us for each object that it tracks."""
    images, rows = SHORT_ROWS["triangles"]
    text = f'{{"images":[{",".join(images)}],"annotations":[{",".join(rows)}],"categories":[{{"id":1}}]}}'
    (tmp_path / "truth.json").write_text(text)
    gc.collect()
    before = len(gc.get_objects())
    dataset = read_dataset(AllowedDirs({"sets": tmp_path}, "data_folders"), "sets/truth.json", "sets")
    gc.collect()
    assert len(dataset.rows) == len(rows)
    assert len(gc.get_objects()) - before < len(images) + 100


def test_no_call_of_the_json_decoder_sees_more_than_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, rows = SHORT_ROWS["triangles"]
    text = f'{{"images":[{",".join(images)}],"annotations":[{",".join(rows)}],"categories":[{{"id":1}}]}}'
    (tmp_path / "truth.json").write_text(text)
    decoded: list[int] = []
    inner = json.JSONDecoder.raw_decode

    def recorded(self: json.JSONDecoder, text: str, start: int = 0) -> tuple[Any, int]:
        value, end = inner(self, text, start)
        decoded.append(end - start)
        return value, end

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", recorded)
    read_dataset(AllowedDirs({"sets": tmp_path}, "data_folders"), "sets/truth.json", "sets")
    assert len(decoded) > len(rows)
    assert max(decoded) < 200


def test_a_row_too_long_to_be_parsed_in_one_piece_is_refused(folder: Path) -> None:
    truth = json.loads((folder / "truth.json").read_text())
    truth["annotations"][0]["segmentation"] = [[1.25] * MAX_ROW_CHARS]
    (folder / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        evaluate(on_server(), **data_folders(folder))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields_of(status_details(raised.value)) == ["options.dataset.annotations"]


def test_more_categories_than_a_report_may_have_are_refused(folder: Path) -> None:
    truth = json.loads((folder / "truth.json").read_text())
    truth["categories"] += [{"id": n} for n in range(100, 100 + MAX_CATEGORIES)]
    (folder / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        evaluate(on_server(), **data_folders(folder))
    assert fields_of(status_details(raised.value)) == ["options.dataset.annotations"]


def test_images_of_more_categories_than_a_report_may_have_end_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mal_server.evaluation.run.MAX_CATEGORIES", 5)
    image, objects = SCENES[0]
    messages = [message_of(str(n), encoded(image), [truth_of(1, objects[0][1], n, None)]) for n in range(6)]
    assert evaluate(options_of(), *messages[:5])[1].images == 5
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        evaluate(options_of(), *messages)
    assert fields_of(status_details(raised.value)) == ["image.ground_truth"]


@pytest.mark.parametrize("length", [1000, 1001])
def test_names_of_categories_are_bounded(folder: Path, length: int) -> None:
    truth = json.loads((folder / "truth.json").read_text())
    truth["categories"][0]["name"] = "n" * length
    (folder / "truth.json").write_text(json.dumps(truth))
    named = options_of()
    named.options.categories[0].name = "n" * length
    for messages, field in (([on_server()], "options.dataset.annotations"), ([named], "options.categories")):
        if length <= 1000:
            evaluate(*messages, **data_folders(folder))
            continue
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            evaluate(*messages, **data_folders(folder))
        assert fields_of(status_details(raised.value)) == [field]


def test_ids_beyond_64_bits_are_numbered(folder: Path) -> None:
    expected = evaluate(on_server(), **data_folders(folder))[1]
    truth = json.loads((folder / "truth.json").read_text())
    for row in (*truth["annotations"], *truth["categories"]):
        row["id"] += 2**70
    for row in truth["annotations"]:
        row["category_id"] += 2**70
    (folder / "truth.json").write_text(json.dumps(truth))
    result = evaluate(on_server(), **data_folders(folder))[1]
    assert result.overall == expected.overall
    assert [row.category.category_id for row in result.categories] == [1, 2]


def test_the_objects_of_an_image_take_no_more_memory_than_is_held_for_it(tmp_path: Path) -> None:
    options = read_evaluate_options(options_of(), CallDefaults(Branch.STUDENT, Priority.BATCH, math.inf))
    box, mask = (1.5, 2.5, 30.25, 40.75), Rle(90, 120, b"012" * 30)
    message = message_of("a", b"x" * 2**16, [truth_of(2**60 + index, box, 2**60, mask) for index in range(1000)])
    content = json.dumps(
        {
            "images": [{"id": 1, "file_name": "1.png"}],
            "categories": [{"id": 1}],
            "annotations": [
                {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "segmentation": [[1, 1, 9, 1, 9, 9] * 20]}
                for n in range(1000)
            ],
        },
        separators=(",", ":"),
    )
    (tmp_path / "truth.json").write_text(content)
    dataset = read_dataset(AllowedDirs({"sets": tmp_path}, "data_folders"), "sets/truth.json", "sets")
    (streamed,) = asyncio.run(collect(read_images(each([message]), options, Limits())))
    (stored,) = dataset.images(options.label_request, 1000, {})
    for image in (streamed, stored):
        tracemalloc.start()
        try:
            truth = image.read()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(truth.annotations) == 1000
        assert peak <= image.memory


def test_more_objects_than_an_image_may_have_are_counted_and_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(*args: Any) -> None:
        raise AssertionError("an object was read")

    image, objects = SCENES[0]
    many = message_of("crowded", encoded(image), [truth_of(n, *objects[0][1:], is_crowd=n > 1) for n in range(50)])
    monkeypatch.setattr("mal_server.api.serialization.evaluation_messages.read_ground_truth", unread)
    _, result = evaluate(options_of(), many, limits={"max_boxes": 49})
    assert [(row.reason, row.instances) for row in result.skipped] == [("REQUEST_REFUSED", 50)]
    assert (result.images, result.images_skipped) == (0, 1)


def test_a_data_set_image_with_more_objects_than_allowed_is_counted_and_never_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*args: Any) -> None:
        raise AssertionError("an object was read")

    monkeypatch.setattr(Dataset, "_read", unread)
    whole = on_server(label=types_pb2.LabelOptions(resolve_overlaps=True))
    _, result = evaluate(whole, limits={"max_boxes": 2}, **data_folders(folder))
    assert [(row.reason, row.instances) for row in result.skipped] == [("REQUEST_REFUSED", 18)]
    assert result.images_skipped == 6


def test_memory_of_an_image_is_held_before_its_objects_are_read_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quotas: list[MemoryQuota] = []
    held: list[int] = []
    expected = 2 * scenes()[0].ByteSize() + 3 * MEMORY_OF_AN_OBJECT
    read = read_ground_truth

    def made(*args: Any) -> MemoryQuota:
        quotas.append(MemoryQuota(*args))
        return quotas[-1]

    def reading(*args: Any) -> GroundTruth:
        held.append(quotas[0].used)
        return read(*args)

    monkeypatch.setattr("mal_server.api.service.MemoryQuota", made)
    monkeypatch.setattr("mal_server.api.serialization.evaluation_messages.read_ground_truth", reading)

    async def work() -> tuple[int, int]:
        async with serving(limits={"max_items_in_flight": 1}) as running:
            over = asyncio.Event()

            async def messages() -> AsyncIterator[Request]:
                yield options_of()
                yield scenes()[0]
                await over.wait()

            call = aiter(running.evaluation.Evaluate(messages()))
            await anext(call)
            counted = quotas[0].used
            over.set()
            assert len([response async for response in call]) == 1
            while quotas[0].used:
                await asyncio.sleep(0.001)
            return held[0], counted

    before, counted = asyncio.run(asyncio.wait_for(work(), 60))
    assert before >= expected
    # What three compared masks of two categories take; the image itself is given back.
    assert 0 < counted <= memory_of_results(3, 0, 3 * 2000, 2)


def test_records_count_as_memory_as_they_arrive() -> None:
    options = read_evaluate_options(
        on_server(resume_token=b"t"), CallDefaults(Branch.STUDENT, Priority.BATCH, math.inf)
    )
    messages = [Request(image=evaluation_pb2.EvaluateImage(item_id=str(index), record=b"123")) for index in range(4)]
    one_record = 4 + MEMORY_OF_A_RECORD
    budget = MemoryQuota(4 * one_record, "max_evaluation_bytes")
    with budget.reserve() as alone:
        assert len(asyncio.run(read_records(each(messages), options, alone.grow))) == 4
        assert budget.used == 4 * one_record
        with budget.reserve() as late, pytest.raises(MemoryFull):
            asyncio.run(read_records(each(messages), options, late.grow))
        assert budget.used == 4 * one_record
        with pytest.raises(CallTooLarge):
            asyncio.run(read_records(each(messages[:1]), options, alone.grow))
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


def test_no_call_holds_more_than_the_limit_not_even_the_first() -> None:
    budget = MemoryQuota(10, "max_evaluation_bytes")
    with budget.reserve() as first:
        with pytest.raises(CallTooLarge, match="max_evaluation_bytes"):
            first.grow(11)
        first.grow(10)
        with pytest.raises(CallTooLarge):
            first.grow(1)
        first.shrink(4)
        first.grow(4)
        assert budget.used == first.size == 10
    assert budget.used == 0


@pytest.mark.parametrize(
    "work_of_a_thread",
    [
        "mal_server.api.serialization.evaluation_messages.read_ground_truth",
        "mal_train.core.metrics.evaluator.Evaluator.report",
        "mal_server.api.serialization.evaluation_messages.write_result",
        "mal_server.evaluation.run.clear_in_parts",
    ],
)
def test_memory_is_held_while_a_thread_works_for_a_cancelled_call(
    work_of_a_thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, gate, over = threading.Event(), threading.Event(), threading.Event()
    budgets: list[MemoryQuota] = []
    leave = Reservation.__exit__

    def made(*args: Any) -> MemoryQuota:
        budgets.append(MemoryQuota(*args))
        return budgets[-1]

    def blocked(*args: Any, **options: Any) -> None:
        started.set()
        assert gate.wait(60)

    def left(self: Reservation, *args: Any) -> None:
        leave(self, *args)
        over.set()

    monkeypatch.setattr("mal_server.api.service.MemoryQuota", made)
    monkeypatch.setattr(work_of_a_thread, blocked)
    monkeypatch.setattr(Reservation, "__exit__", left)

    async def work() -> None:
        async with serving(threads=3) as running:
            call = running.evaluation.Evaluate(each([options_of(), *scenes()[:1]]))
            reading = asyncio.create_task(collect(call))
            assert await asyncio.to_thread(started.wait, 60)
            # Not the task: cancelled between two reads, it does not cancel the call (grpc.aio).
            call.cancel()
            assert await asyncio.to_thread(over.wait, 60)
            for _ in range(20):  # the other threads would have freed it by then
                await asyncio.sleep(0.002)
                assert budgets[0].used > 0
            gate.set()
            await asyncio.gather(reading, return_exceptions=True)
            while budgets[0].used:
                await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_what_an_evaluation_holds_is_freed_outside_the_event_loop(
    is_cancelled: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 000 compared masks take a quarter of a second to free, during which nothing else runs in that thread."""
    cleared: list[tuple[str, int]] = []
    quotas: list[MemoryQuota] = []
    clear = clear_in_parts

    def recorded(values: Any) -> None:
        cleared.append((threading.current_thread().name, len(values)))
        clear(values)

    def made(*args: Any) -> MemoryQuota:
        quotas.append(MemoryQuota(*args))
        return quotas[-1]

    for module in ("mal_server.evaluation.run", "mal_train.core.metrics.evaluator"):
        monkeypatch.setattr(f"{module}.clear_in_parts", recorded)
    monkeypatch.setattr("mal_server.api.service.MemoryQuota", made)

    async def work() -> None:
        async with serving(**data_folders(folder)) as running:
            call = running.evaluation.Evaluate(each([on_server()]))
            reading = asyncio.create_task(collect(call))
            if is_cancelled:
                while not quotas[0].used:
                    await asyncio.sleep(0)
                call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            while quotas[0].used:
                await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(work(), 60))
    assert all(name.startswith("cpu") for name, _ in cleared)
    if not is_cancelled:
        assert sum(size for _, size in cleared) > 4 * len(SCENES)

"""Evaluations of data sets on the server, and evaluations that go on after a break with what was measured before."""

import asyncio
import hashlib
import json
import math
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from mal.v1 import evaluation_pb2, types_pb2
from mal_client.cli import main
from mal_client.client import Client
from mal_client.evaluation.checkpoint import EvaluationRecords

from mal_server.api.serialization.evaluation_messages import read_evaluate_options, read_records
from mal_server.api.serialization.labeling_messages import CallDefaults
from mal_server.errors import InvalidRequest
from mal_server.evaluation.dataset_reader import Dataset
from mal_server.scheduling.priority import Priority
from mal_train.core.errors import ConfigError
from mal_train.core.settings import Branch
from tests.mal_client.test_against_server import served
from tests.mal_server.calls import fields_of, reason_of, status_details
from tests.mal_server.evaluation.served_datasets import Request, data, on_server, run, written
from tests.mal_server.evaluation.test_run import SCENES, evaluate, options_of, scenes
from tests.mal_server.fakes import BrightPredictor, encoded, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "sets")


def crops_run(predictor: BrightPredictor) -> int:
    return sum(size for _, size in predictor.batches)


def carrying(message: Request, record: bytes) -> Request:
    """An image with its record and, in the place of its content, a hash."""

    changed = Request()
    changed.CopyFrom(message)
    sha256 = hashlib.sha256(message.image.image.content).hexdigest()
    changed.image.image.content_sha256 = sha256
    changed.image.record = record
    return changed


def test_a_data_set_on_the_server_gives_the_figures_of_the_same_images_streamed(folder: Path) -> None:
    streamed = evaluate(options_of(), *scenes())[1]
    progress, found = evaluate(on_server(), **data(folder))
    assert [one.images_total for one in progress] == [6] * 6
    for result in (streamed, found):  # the two name images differently
        for row in result.worst:
            row.item_id = ""
    assert found == streamed


def test_a_file_that_is_missing_on_the_server_is_counted(folder: Path) -> None:
    (folder / "images" / "2.png").unlink()
    result = evaluate(on_server(), **data(folder))[1]
    assert {row.reason: row.instances for row in result.skipped} == {"IMAGE_NOT_FOUND": 3}
    assert (result.images, result.images_skipped) == (5, 1)


@pytest.mark.parametrize(
    ("annotations", "images", "found"),
    [
        ("sets/none.json", "sets/images", "FILE_NOT_FOUND"),
        ("other/truth.json", "sets/images", "FOLDER_NOT_FOUND"),
        ("sets/truth.json", "sets/pictures", "FILE_NOT_FOUND"),
        ("sets/../truth.json", "sets/images", "options.dataset.annotations"),
        ("sets/truth.json", "sets/../..", "options.dataset.images"),
        ("sets/images/0.png", "sets/images", "options.dataset.annotations"),
        ("", "sets/images", "options.dataset"),
        ("sets/out.json", "sets/images", "FILE_NOT_FOUND"),
    ],
)
def test_only_data_sets_below_the_folders_are_read(folder: Path, annotations: str, images: str, found: str) -> None:
    (folder.parent / "secret.json").write_text("{}")
    (folder / "out.json").symlink_to(folder.parent / "secret.json")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        evaluate(on_server(annotations, images), **data(folder))
    status = status_details(raised.value)
    assert (reason_of(status) or ",".join(fields_of(status))) == found
    assert str(folder) not in (raised.value.details() or "")


def test_an_image_of_a_data_set_cannot_lead_out_of_its_folder(folder: Path) -> None:
    (folder.parent / "secret.png").write_bytes((folder / "images" / "0.png").read_bytes())
    content = json.loads((folder / "truth.json").read_text())
    content["images"][0]["file_name"] = "../../secret.png"
    (folder / "truth.json").write_text(json.dumps(content))
    result = evaluate(on_server(), **data(folder))[1]
    assert {row.reason: row.instances for row in result.skipped} == {"REQUEST_REFUSED": 3}


@pytest.mark.parametrize("is_on_server", [False, True])
def test_an_evaluation_that_goes_on_measures_only_what_is_left_and_ends_with_the_same_figures(
    folder: Path, is_on_server: bool
) -> None:
    async def work() -> tuple[Any, Any, int]:
        async with serving(**data(folder)) as running:
            first = on_server(want_records=True) if is_on_server else options_of(want_records=True)
            images = [] if is_on_server else scenes()
            progress, whole = await run(running, [first, *images])
            known = progress[:4]
            assert all(one.record for one in known)
            first.options.resume_token = known[0].resume_token
            if is_on_server:
                again = [
                    Request(image=evaluation_pb2.EvaluateImage(item_id=one.item_id, record=one.record)) for one in known
                ]
            else:
                again = [carrying(image, one.record) for image, one in zip(images, known, strict=False)] + images[4:]
            running.predictor.batches.clear()
            _, resumed = await run(running, [first, *again])
            return whole, resumed, crops_run(running.predictor)

    whole, resumed, crops = asyncio.run(work())
    assert resumed == whole
    assert crops == 2 * 3


def spoilt(message: Request, how: str) -> Request:
    changed = Request()
    changed.CopyFrom(message)
    image = changed.image
    if how == "a flipped bit":
        image.record = image.record[:-9] + bytes([image.record[-9] ^ 1]) + image.record[-8:]
    elif how == "another picture":
        image.image.content_sha256 = "0" * 64
    elif how == "another box":
        image.ground_truth[0].instance.box.x += 1
    elif how == "another name":
        image.item_id = "x"
    elif how == "cut":
        image.record = image.record[:40]
    return changed


@pytest.mark.parametrize("how", ["a flipped bit", "another picture", "another box", "another name", "cut"])
def test_a_record_of_something_else_is_refused(how: str) -> None:
    async def work() -> list[str]:
        async with serving() as running:
            first, images = options_of(want_records=True), scenes()
            progress, _ = await run(running, [first, *images])
            first.options.resume_token = progress[0].resume_token
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await run(running, [first, spoilt(carrying(images[0], progress[0].record), how)])
            return fields_of(status_details(raised.value))

    assert asyncio.run(work()) == ["image.record"]


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 0.3},
        {"flip_test": True},
        {"branch": types_pb2.BRANCH_TEACHER},
        {"min_component_area_px": 9},
        {"resolve_overlaps": True},
    ],
)
def test_a_token_is_stale_under_other_options(change: dict[str, Any]) -> None:
    async def work() -> str:
        async with serving() as running:
            progress, _ = await run(running, [options_of(want_records=True), *scenes()[:1]])
            label = types_pb2.LabelOptions(**change)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await run(running, [options_of(label=label, resume_token=progress[0].resume_token)])
            return reason_of(status_details(raised.value))

    assert asyncio.run(work()) == "RESUME_TOKEN_STALE"


def test_records_that_no_token_came_with_are_refused_at_the_first() -> None:
    options = read_evaluate_options(on_server(), CallDefaults(Branch.STUDENT, Priority.BATCH, math.inf))
    records = [Request(image=evaluation_pb2.EvaluateImage(item_id=str(place), record=b"x")) for place in range(9)]
    read: list[Request] = []
    held: list[int] = []

    async def messages() -> AsyncIterator[Request]:
        for record in records:
            read.append(record)
            yield record

    with pytest.raises(InvalidRequest, match=r"options\.resume_token"):
        asyncio.run(read_records(messages(), options, held.append))
    assert len(read) == 1
    assert not held


def test_records_of_images_that_the_data_set_does_not_have_let_the_evaluation_begin_anew(folder: Path) -> None:
    async def work() -> str:
        async with serving(**data(folder)) as running:
            progress, _ = await run(running, [on_server(want_records=True)])
            records = [
                Request(image=evaluation_pb2.EvaluateImage(item_id=p.item_id, record=p.record)) for p in progress
            ]
            (folder / "truth.json").write_text((folder / "truth.json").read_text().replace("2.png", "other.png"))
            with pytest.raises(grpc.aio.AioRpcError, match=r"1 of 6 records .* '2\.png'") as raised:
                await run(running, [on_server(resume_token=progress[0].resume_token), *records])
            return reason_of(status_details(raised.value))

    assert asyncio.run(work()) == "RESUME_TOKEN_STALE"


def test_a_large_data_set_is_sorted_out_beside_the_event_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    inner = Dataset.truths

    def truths(self: Dataset, *args: Any) -> Iterator[Any]:
        threads.append(threading.current_thread())
        return inner(self, *args)

    monkeypatch.setattr(Dataset, "truths", truths)
    assert evaluate(on_server(), **data(folder))[1].images == 6
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("has_key", [False, True])
def test_a_token_outlives_a_restart_where_the_settings_hold_its_key(
    has_key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAL_TEST_RESUME", "0123456789abcdef")
    settings: dict[str, Any] = {"resume_key": "env:MAL_TEST_RESUME"} if has_key else {}

    async def work() -> str:
        async with serving(**settings) as running:
            progress, _ = await run(running, [options_of(want_records=True), *scenes()[:1]])
        async with serving(**settings) as running:
            again = options_of(resume_token=progress[0].resume_token)
            # A caller that is still sending may see the stream end before it sees why.
            images = [carrying(scenes()[0], progress[0].record)] if has_key else []
            try:
                await run(running, [again, *images])
            except grpc.aio.AioRpcError as error:
                return reason_of(status_details(error))
            return "OK"

    assert asyncio.run(work()) == ("OK" if has_key else "RESUME_TOKEN_STALE")


class Interrupted(Exception):
    """Somebody ends the command."""


@pytest.fixture
def predictor() -> BrightPredictor:
    return BrightPredictor()


@pytest.fixture
def address(predictor: BrightPredictor, folder: Path) -> Iterator[str]:
    with served(predictor, **data(folder)) as found:
        yield found


@pytest.mark.parametrize("is_on_server", [False, True])
def test_a_client_that_was_ended_goes_on_from_its_file(
    address: str, predictor: BrightPredictor, folder: Path, tmp_path: Path, is_on_server: bool
) -> None:
    kept = tmp_path / "kept.jsonl"

    notices: list[str] = []

    def measured(on_progress: Any = None, resume: Path | None = None) -> Any:
        how: dict[str, Any] = {"on_progress": on_progress, "on_notice": notices.append, "resume": resume}
        with Client(address) as client:
            if is_on_server:
                return client.evaluate_on_server("sets/truth.json", "sets/images", **how)
            return client.evaluate(folder / "truth.json", folder / "images", **how)

    def stop(progress: Any) -> None:
        if progress.images_done == 4:
            raise Interrupted

    predictor.batches.clear()  # those of the self-test
    whole = measured()
    with pytest.raises(Interrupted):
        measured(stop, kept)
    with kept.open("ab") as file:
        file.write(b'\n{"item": "cut')  # the process was killed while it wrote
    assert notices == []
    seen: list[Any] = []
    assert measured(seen.append, kept).to_dict() == whole.to_dict()
    assert notices == [f"{kept}: going on with an unfinished evaluation; 4 images are measured"]
    assert (seen[-1].images_done, seen[-1].images_before) == (6, 4)
    # The whole run, all that the ended one can have begun, and the two images of which no record had come.
    assert crops_run(predictor) <= 6 * 3 + 6 * 3 + 2 * 3
    assert not kept.exists()


def test_two_evaluations_do_not_keep_their_records_in_one_file(
    address: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept.jsonl"
    line = ["evaluate", "--server", address, "--annotations", str(folder / "truth.json")]
    line += ["--images", str(folder / "images"), "--resume", str(kept)]
    with closing(EvaluationRecords(kept, {})):
        assert main.main(line) == 4
    assert "another evaluation keeps its records there" in capsys.readouterr().err
    assert main.main(line) == 0
    assert not kept.exists()


def test_the_command_evaluates_on_the_server(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["evaluate", "--server", address, "--annotations", "sets/truth.json", "--images", "sets/images"]
    assert main.main([*line, "--on-server", "--output", str(tmp_path / "figures.json")]) == 0
    assert "18 masks on 6 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["count"] == 18
    assert main.main([*line, "--on-server", "--report", str(tmp_path / "page.html")]) == 2


def test_a_file_of_another_evaluation_is_not_taken(address: str, folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    header = {"what": "mal-client evaluation records", "job": {}, "token": ""}
    line = ["evaluate", "--server", address, "--annotations", str(folder / "truth.json")]
    for text in (json.dumps(header), "a file of somebody else's"):
        kept.write_text(text)
        assert main.main([*line, "--images", str(folder / "images"), "--resume", str(kept)]) == 2
        assert kept.read_text() == text


@pytest.mark.parametrize(
    "row",
    [
        {"content": "", "record": "eA=="},
        {"item": "a", "content": "", "record": 3},
        {"item": "a", "content": "", "record": "x"},
        {"item": ["a"], "content": "", "record": "eA=="},
    ],
)
def test_a_file_with_a_line_that_is_no_record_is_refused_in_words(tmp_path: Path, row: dict[str, Any]) -> None:
    kept = tmp_path / "kept.jsonl"
    header = {"what": "mal-client evaluation records", "job": {}, "token": "eA=="}
    kept.write_text(json.dumps(header) + "\n" + json.dumps(row))
    with pytest.raises(ConfigError, match=r"kept\.jsonl: holds a line that is no record"):
        EvaluationRecords(kept, {})


def test_encoded_scenes_are_what_the_files_hold(folder: Path) -> None:
    assert (folder / "images" / "0.png").read_bytes() == encoded(SCENES[0][0])

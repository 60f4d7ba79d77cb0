"""Evaluations of data sets on the server, and evaluations that resume with the records of an earlier stream."""

import asyncio
import hashlib
import json
import math
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from mal.v1 import evaluation_pb2, types_pb2
from mal_client.cli import main
from mal_client.client import Client
from mal_client.evaluation.checkpoint import IN_USE, EvaluationCheckpoint

from mal_server.api.serialization.evaluation_messages import read_evaluate_options, read_records
from mal_server.api.serialization.labeling_messages import CallDefaults, read_box
from mal_server.errors import InvalidRequest
from mal_server.evaluation.resume_tokens import GroundTruth, InstanceScore, ItemFailure, ResumeTokens, SampleResult
from mal_server.inference.image_store import FileImage, InlineImage
from mal_server.inference.requests import LabelRequest, OutputOptions
from mal_server.scheduling.priority import Priority
from mal_train.core.coco.stream import scan_coco
from mal_train.core.errors import ConfigError
from mal_train.core.images.container import ImageRegion
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Branch
from mal_train.kernel.labeler.types import PredictOptions
from tests.mal_client.test_against_server import served
from tests.mal_server.calls import fields_of, reason_of, status_details
from tests.mal_server.evaluation.served_datasets import Request, data_folders, on_server, run_evaluation, write_dataset
from tests.mal_server.evaluation.test_run import SCENES, evaluate, options_of, scenes
from tests.mal_server.fakes import BrightPredictor, encoded, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "sets")


def crops_run(predictor: BrightPredictor) -> int:
    return sum(size for _, size in predictor.batches)


def with_record(message: Request, record: bytes) -> Request:
    """Returns an image with its record, and with a hash instead of its content."""
    changed = Request()
    changed.CopyFrom(message)
    sha256 = hashlib.sha256(message.image.image.content).hexdigest()
    changed.image.image.content_sha256 = sha256
    changed.image.record = record
    return changed


def test_a_data_set_on_the_server_gives_the_metrics_of_the_same_images_streamed(folder: Path) -> None:
    streamed = evaluate(options_of(), *scenes())[1]
    progress, read_there = evaluate(on_server(), **data_folders(folder))
    assert [one.images_total for one in progress] == [6] * 6
    for result in (streamed, read_there):  # item ids differ: file names, or names of the stream
        for row in result.worst:
            row.item_id = ""
    assert read_there == streamed


def test_a_file_that_is_missing_on_the_server_is_counted(folder: Path) -> None:
    (folder / "images" / "2.png").unlink()
    result = evaluate(on_server(), **data_folders(folder))[1]
    assert {row.reason: row.instances for row in result.skipped} == {"IMAGE_NOT_FOUND": 3}
    assert (result.images, result.images_skipped) == (5, 1)


@pytest.mark.parametrize(
    ("annotations", "images", "expected"),
    [
        ("sets/none.json", "sets/images", "FILE_NOT_FOUND"),
        ("other/truth.json", "sets/images", "FOLDER_NOT_FOUND"),
        ("sets/truth.json", "sets/photos", "FILE_NOT_FOUND"),
        ("sets/../truth.json", "sets/images", "options.dataset.annotations"),
        ("sets/truth.json", "sets/../..", "options.dataset.images"),
        ("sets/images/0.png", "sets/images", "options.dataset.annotations"),
        ("", "sets/images", "options.dataset"),
        ("sets/out.json", "sets/images", "FILE_NOT_FOUND"),
    ],
)
def test_only_data_sets_below_the_data_folders_are_read(
    folder: Path, annotations: str, images: str, expected: str
) -> None:
    (folder.parent / "secret.json").write_text("{}")
    (folder / "out.json").symlink_to(folder.parent / "secret.json")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        evaluate(on_server(annotations, images), **data_folders(folder))
    status = status_details(raised.value)
    assert (reason_of(status) or ",".join(fields_of(status))) == expected
    assert str(folder) not in (raised.value.details() or "")


def test_rows_of_a_data_set_that_belong_to_no_image_are_counted_and_named(folder: Path) -> None:
    content = json.loads((folder / "truth.json").read_text())
    content["annotations"] += [5, {**content["annotations"][0], "id": 900, "image_id": 77}]
    (folder / "truth.json").write_text(json.dumps(content))
    result = evaluate(on_server(), **data_folders(folder))[1]
    assert {row.reason: row.instances for row in result.skipped} == {"NOT_AN_OBJECT": 1, "IMAGE_UNKNOWN": 1}
    messages = {row.reason: row.message for row in result.skipped}
    assert messages["NOT_AN_OBJECT"].startswith("annotations[")
    assert messages["IMAGE_UNKNOWN"].startswith("annotation 900: ")


def test_an_image_of_a_data_set_cannot_lead_out_of_its_folder(folder: Path) -> None:
    (folder.parent / "secret.png").write_bytes((folder / "images" / "0.png").read_bytes())
    content = json.loads((folder / "truth.json").read_text())
    content["images"][0]["file_name"] = "../../secret.png"
    (folder / "truth.json").write_text(json.dumps(content))
    result = evaluate(on_server(), **data_folders(folder))[1]
    assert {row.reason: row.instances for row in result.skipped} == {"REQUEST_REFUSED": 3}


@pytest.mark.parametrize("is_on_server", [False, True])
def test_a_resumed_evaluation_labels_only_the_remaining_images_and_has_the_same_metrics(
    folder: Path, is_on_server: bool
) -> None:
    async def work() -> tuple[Any, Any, int]:
        async with serving(**data_folders(folder)) as running:
            first = on_server(want_records=True) if is_on_server else options_of(want_records=True)
            images = [] if is_on_server else scenes()
            progress, complete = await run_evaluation(running, [first, *images])
            known = progress[:4]
            assert all(one.record for one in known)
            first.options.resume_token = known[0].resume_token
            if is_on_server:
                again = [
                    Request(image=evaluation_pb2.EvaluateImage(item_id=one.item_id, record=one.record)) for one in known
                ]
            else:
                again = [with_record(image, one.record) for image, one in zip(images, known, strict=False)] + images[4:]
            running.predictor.batches.clear()
            _, resumed = await run_evaluation(running, [first, *again])
            return complete, resumed, crops_run(running.predictor)

    complete, resumed, crops = asyncio.run(work())
    assert resumed == complete
    assert crops == 2 * 3


def damaged(message: Request, damage: str) -> Request:
    changed = Request()
    changed.CopyFrom(message)
    image = changed.image
    if damage == "a flipped bit":
        image.record = image.record[:-9] + bytes([image.record[-9] ^ 1]) + image.record[-8:]
    elif damage == "another image":
        image.image.content_sha256 = "0" * 64
    elif damage == "another box":
        image.ground_truth[0].instance.box.x += 1
    elif damage == "another name":
        image.item_id = "x"
    elif damage == "another place":
        image.image.region.CopyFrom(types_pb2.ImageRegion(image_width=1000, image_height=1000))
    elif damage == "truncated":
        image.record = image.record[:40]
    return changed


@pytest.mark.parametrize(
    "damage", ["a flipped bit", "another image", "another place", "another box", "another name", "truncated"]
)
def test_a_damaged_record_or_one_of_another_image_is_refused(damage: str) -> None:
    async def work() -> list[str]:
        async with serving() as running:
            first, images = options_of(want_records=True), scenes()
            progress, _ = await run_evaluation(running, [first, *images])
            first.options.resume_token = progress[0].resume_token
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await run_evaluation(running, [first, damaged(with_record(images[0], progress[0].record), damage)])
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
            progress, _ = await run_evaluation(running, [options_of(want_records=True), *scenes()[:1]])
            label = types_pb2.LabelOptions(**change)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await run_evaluation(running, [options_of(label=label, resume_token=progress[0].resume_token)])
            return reason_of(status_details(raised.value))

    assert asyncio.run(work()) == "RESUME_TOKEN_STALE"


def test_records_without_a_token_are_refused_at_the_first_record() -> None:
    options = read_evaluate_options(on_server(), CallDefaults(Branch.STUDENT, Priority.BATCH, math.inf))
    records = [Request(image=evaluation_pb2.EvaluateImage(item_id=str(index), record=b"x")) for index in range(9)]
    read: list[Request] = []
    reserved: list[int] = []

    async def messages() -> AsyncIterator[Request]:
        for record in records:
            read.append(record)
            yield record

    with pytest.raises(InvalidRequest) as raised:
        asyncio.run(read_records(messages(), options, reserved.append))
    assert [field for field, _ in raised.value.violations] == ["options.resume_token"]
    assert len(read) == 1
    assert not reserved


def test_records_of_images_that_are_not_in_the_data_set_are_stale(folder: Path) -> None:
    async def work() -> str:
        async with serving(**data_folders(folder)) as running:
            progress, _ = await run_evaluation(running, [on_server(want_records=True)])
            records = [
                Request(image=evaluation_pb2.EvaluateImage(item_id=p.item_id, record=p.record)) for p in progress
            ]
            (folder / "truth.json").write_text((folder / "truth.json").read_text().replace("2.png", "other.png"))
            with pytest.raises(grpc.aio.AioRpcError, match=r"1 of 6 records .* '2\.png'") as raised:
                await run_evaluation(running, [on_server(resume_token=progress[0].resume_token), *records])
            return reason_of(status_details(raised.value))

    assert asyncio.run(work()) == "RESUME_TOKEN_STALE"


def test_objects_are_read_outside_the_event_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, set[threading.Thread]] = {"scan_coco": set(), "loads": set(), "read_box": set()}

    def recorded(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            threads[name].add(threading.current_thread())
            return function(*args, **options)

        return call

    monkeypatch.setattr("mal_server.evaluation.dataset_reader.scan_coco", recorded("scan_coco", scan_coco))
    monkeypatch.setattr("json.loads", recorded("loads", json.loads))
    monkeypatch.setattr("mal_server.api.serialization.evaluation_messages.read_box", recorded("read_box", read_box))
    assert evaluate(on_server(), **data_folders(folder))[1].images == 6
    assert evaluate(options_of(), *scenes())[1].images == 6
    for seen in threads.values():
        assert seen
        assert threading.main_thread() not in seen


@pytest.mark.parametrize("has_key", [False, True])
def test_a_token_survives_a_restart_if_the_settings_have_a_resume_key(
    has_key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAL_TEST_RESUME", "0123456789abcdef")
    settings: dict[str, Any] = {"resume_key": "env:MAL_TEST_RESUME"} if has_key else {}

    async def work() -> str:
        async with serving(**settings) as running:
            progress, _ = await run_evaluation(running, [options_of(want_records=True), *scenes()[:1]])
        async with serving(**settings) as running:
            again = options_of(resume_token=progress[0].resume_token)
            # A client that is still sending may see the end of the stream before its status.
            images = [with_record(scenes()[0], progress[0].record)] if has_key else []
            try:
                await run_evaluation(running, [again, *images])
            except grpc.aio.AioRpcError as error:
                return reason_of(status_details(error))
            return "OK"

    assert asyncio.run(work()) == ("OK" if has_key else "RESUME_TOKEN_STALE")


class Interrupted(Exception):
    """Ends an evaluation as an interrupt does."""


@pytest.fixture
def predictor() -> BrightPredictor:
    return BrightPredictor()


@pytest.fixture
def address(predictor: BrightPredictor, folder: Path) -> Iterator[str]:
    with served(predictor, **data_folders(folder)) as server_address:
        yield server_address


@pytest.mark.parametrize("is_on_server", [False, True])
def test_an_interrupted_client_resumes_from_its_file(
    address: str, predictor: BrightPredictor, folder: Path, tmp_path: Path, is_on_server: bool
) -> None:
    records_path = tmp_path / "records.jsonl"
    notices: list[str] = []

    def evaluated(on_progress: Any = None, resume: Path | None = None) -> Any:
        options: dict[str, Any] = {"on_progress": on_progress, "on_notice": notices.append, "resume": resume}
        with Client(address) as client:
            if is_on_server:
                return client.evaluate_on_server("sets/truth.json", "sets/images", **options)
            return client.evaluate(folder / "truth.json", folder / "images", **options)

    def stop(progress: Any) -> None:
        if progress.images_done == 4:
            raise Interrupted

    predictor.batches.clear()  # batches of the self-test
    complete = evaluated()
    with pytest.raises(Interrupted):
        evaluated(stop, records_path)
    with records_path.open("ab") as file:
        file.write(b'\n{"item": "cut')  # incomplete: the process was killed
    assert notices == []
    seen: list[Any] = []
    assert evaluated(seen.append, records_path).to_dict() == complete.to_dict()
    (notice,) = notices
    assert str(records_path) in notice
    assert notice.endswith(" 4")
    assert (seen[-1].images_done, seen[-1].images_before) == (6, 4)
    # The complete run, all images that the interrupted run may have started, and the two images without a record.
    assert crops_run(predictor) <= 6 * 3 + 6 * 3 + 2 * 3
    assert not records_path.exists()


def test_two_evaluations_cannot_use_one_file(
    address: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records_path = tmp_path / "records.jsonl"
    line = ["evaluate", "--server", address, "--annotations", str(folder / "truth.json")]
    line += ["--images", str(folder / "images"), "--resume", str(records_path)]
    with closing(EvaluationCheckpoint(records_path, {})):
        assert main.main(line) == 4
    assert f"records.jsonl: {IN_USE}" in capsys.readouterr().err
    assert main.main(line) == 0
    assert not records_path.exists()


def test_the_command_evaluates_on_the_server(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["evaluate", "--server", address, "--annotations", "sets/truth.json", "--images", "sets/images"]
    assert main.main([*line, "--on-server", "--output", str(tmp_path / "metrics.json")]) == 0
    assert "18 masks compared on 6 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["count"] == 18
    assert main.main([*line, "--on-server", "--report", str(tmp_path / "page.html")]) == 2


def test_a_file_of_another_evaluation_is_refused_and_unchanged(address: str, folder: Path, tmp_path: Path) -> None:
    records_path = tmp_path / "records.jsonl"
    header = {"what": "mal-client evaluation records", "job": {}, "token": ""}
    line = ["evaluate", "--server", address, "--annotations", str(folder / "truth.json")]
    for text in (json.dumps(header), "a file of another program"):
        records_path.write_text(text)
        assert main.main([*line, "--images", str(folder / "images"), "--resume", str(records_path)]) == 2
        assert records_path.read_text() == text


@pytest.mark.parametrize(
    "row",
    [
        {"content": "", "record": "eA=="},
        {"item": "a", "content": "", "record": 3},
        {"item": "a", "content": "", "record": "x"},
        {"item": ["a"], "content": "", "record": "eA=="},
    ],
)
def test_a_file_with_a_malformed_record_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    records_path = tmp_path / "records.jsonl"
    header = {"what": "mal-client evaluation records", "job": {}, "token": "eA=="}
    records_path.write_text(json.dumps(header) + "\n" + json.dumps(row))
    with pytest.raises(ConfigError, match=r"records\.jsonl: entry 2"):
        EvaluationCheckpoint(records_path, {})


@pytest.mark.parametrize("content", [b"precious", b'{"what": "other"}\n', b"\0" * 1000, b"\n\n\nprecious"])
def test_a_file_that_holds_no_records_is_refused_and_unchanged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        EvaluationCheckpoint(path, {})
    assert path.read_bytes() == content


def test_a_file_that_was_cut_in_its_first_row_holds_no_records(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with closing(EvaluationCheckpoint(path, {"job": 1})) as records:
        records.add(b"token", "a", b"record")
    complete = path.read_bytes()
    for cut in range(complete.index(b"\n", 1)):
        path.write_bytes(complete[:cut])
        with closing(EvaluationCheckpoint(path, {"job": 1})) as records:
            assert len(records) == 0
            records.add(b"token", "b", b"record")
        with closing(EvaluationCheckpoint(path, {"job": 1})) as records:
            assert records.get("b") == b"record"


def test_the_files_hold_the_encoded_scenes(folder: Path) -> None:
    assert (folder / "images" / "0.png").read_bytes() == encoded(SCENES[0][0])


def test_tokens_and_records_of_this_layout_stay_valid() -> None:
    """A renamed field of the options, or a renamed key, would make the records of every unfinished evaluation stale."""
    model: Any = SimpleNamespace(sha256="0" * 64, precision="float32", network_engine="torch")
    tokens = ResumeTokens(b"key", model, PredictOptions(), OutputOptions())
    boxes = ((1.0, 2.0, 3.0, 4.0), (0.0, 0.0, 1.0, 1.0))
    truth = GroundTruth("a.png", (), LabelRequest(InlineImage(b"image"), None, (7, 8), boxes, PredictOptions()))
    scores: dict[Any, Any] = {7: InstanceScore(Rle(2, 2, b"04"), 0.5), 8: ItemFailure("BAD_BOX", "small")}
    record = tokens.seal(SampleResult(truth, scores, None))
    assert tokens.token.hex() == "801b1d38c81f5cad23b600bfb659b622192e16acdfb83f24ef437884346da4af"
    assert record[:32].hex() == "5f57804cc8de4565cd10302b62d8d8338bac91f06957d46fee405088e74d0427"
    assert record[32:] == b'{"answers":[[7,2,2,"04",0.5],[8,"BAD_BOX","small"]],"fault":null}'


@pytest.mark.parametrize("image", [InlineImage(b"image"), FileImage("sets", "a.png")])
def test_a_record_belongs_to_the_place_of_its_part(image: InlineImage | FileImage) -> None:
    model: Any = SimpleNamespace(sha256="0" * 64, precision="float32", network_engine="torch")
    tokens = ResumeTokens(b"key", model, PredictOptions(), OutputOptions())
    regions = (None, ImageRegion(0, 0, (90, 80)), ImageRegion(0, 1, (90, 80)), ImageRegion(0, 0, (90, 81)))
    records = {
        tokens.seal(SampleResult(GroundTruth("a.png", (), request), {7: InstanceScore(Rle(2, 2, b"04"), 0.5)}, None))
        for request in (
            LabelRequest(image, None, (7,), ((1.0, 2.0, 3.0, 4.0),), PredictOptions(), region=region)
            for region in regions
        )
    }
    assert len(records) == len(regions)


def test_a_token_belongs_to_one_engine_and_number_format() -> None:
    numerics = [("torch", "float32"), ("openvino", "float32"), ("openvino", "int8"), ("openvino", "int8_reduced_range")]
    models: list[Any] = [SimpleNamespace(sha256="0" * 64, network_engine=one, precision=two) for one, two in numerics]
    tokens = {ResumeTokens(b"key", model, PredictOptions(), OutputOptions()).token for model in models}
    assert len(tokens) == len(numerics)

"""Parts that processes label in any order are together the output of the local engine, byte for byte."""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mal_train.commands.label import open_labeling_job
from mal_train.core.coco import parquet_reader
from mal_train.core.coco.parquet_parts import Part, divide
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_records import ImageRow
from mal_train.core.coco.parquet_writer import write_part
from mal_train.core.coco.part_folder import PartFolder
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset, ConfigError, DeviceError, DeviceLost, MalError, OutputError, WrongKey
from mal_train.core.images.files import ImageFolder
from mal_train.core.storage.addresses import Location
from mal_train.core.storage.reading import open_random
from mal_train.kernel.checkpoint.keys import parse_key
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.offline import part_labeler
from mal_train.offline.part_labeler import PartJob, PartLabeler, PartResult, decode_message, encode_task
from tests.mal_train.offline.part_jobs import FAILED, as_json, local_labels, spec_of, write_job

IMAGES = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_job(folder, IMAGES)
    return folder


class Output:
    """An open folder of parts, and the job that writes it."""

    def __init__(self, folder: PartFolder, job: PartJob) -> None:
        self.folder, self.job = folder, job

    def label(self, parts: Sequence[Part], **changes: Any) -> list[PartResult]:
        """Labels one task in a new process, as far as a class is one."""
        return results(PartLabeler(dataclasses.replace(self.job, **changes), "cpu", 1), parts)


def results(labeler: PartLabeler, parts: Sequence[Part]) -> list[PartResult]:
    return [decode_message(row["message"][0]) for row in labeler({"task": [encode_task(parts)]})]


@pytest.fixture
def output(files: Path, tmp_path: Path) -> Iterator[Output]:
    dataset = ParquetDataset(files / "boxes.parquet")
    labeling = open_labeling_job(spec_of(files, tmp_path, "json"), "inference", Console.silent())
    parts = divide(dataset.row_groups, 4)
    with PartFolder(tmp_path / "labels.parquet", parts, {"input_sha256": dataset.sha256}) as folder:
        yield Output(
            folder,
            PartJob(
                dataset=files / "boxes.parquet",
                dataset_sha256=dataset.sha256,
                images=ImageFolder(files / "images"),
                output=folder.path,
                journal=folder.journal,
                manifest=folder.manifest_line(),
                provenance=labeling.provenance(),
                checkpoint=str(files / "model.malckpt"),
                checkpoint_sha256=labeling.checkpoint.sha256,
                key=None,
                precision="float32",
                tta=labeling.tta,
                batch_size=3,
            ),
        )


def test_parts_in_any_order_and_written_twice_equal_the_local_output(
    files: Path, output: Output, tmp_path: Path
) -> None:
    tasks = [[part] for part in output.folder.parts] + [list(output.folder.parts[2:4])]
    random.Random(5).shuffle(tasks)
    counts = {result.number: result for task in tasks for result in output.label(task)}
    assert sorted(counts) == [part.number for part in output.folder.parts]
    assert as_json(output.folder.path) == local_labels(files, tmp_path / "local")
    assert sum(result.rows for result in counts.values()) == 2 * IMAGES + 3
    assert sum((Counter(result.failed) for result in counts.values()), Counter()) == FAILED
    assert sum(result.labeled for result in counts.values()) == 2 * IMAGES + 3 - sum(FAILED.values()) - 1


def test_a_process_opens_the_file_once_for_all_of_its_tasks(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Location] = []

    def counted(path: Location) -> Any:
        opened.append(path)
        return open_random(path)

    labeler = PartLabeler(output.job, "cpu", 1)
    monkeypatch.setattr(parquet_reader, "open_random", counted)
    for part in output.folder.parts:
        results(labeler, [part])
    assert len(output.folder.parts) > 2
    assert len(opened) == 2, "to check the file, and to read it"


def test_each_failure_has_its_message(output: Output) -> None:
    messages = Counter(text for part in output.folder.parts for r in output.label([part]) for text in r.messages)
    assert len(messages) == sum(FAILED.values())
    assert any("gone.png" in text for text in messages)


def test_a_part_reports_a_few_messages_and_counts_all_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_labeler, "MAX_MESSAGES", 2)
    result = PartResult(0)
    for text in "abcab":
        result.add_failure("BAD_BOX", text)
    assert (result.failed, result.messages) == ({"BAD_BOX": 5}, {"a": 2, "b": 2})


def test_a_lost_device_ends_the_process_before_the_next_task(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise DeviceError("an illegal address")

    monkeypatch.setattr(Labeler, "predict", failing)
    codes: list[int] = []
    labeler = PartLabeler(output.job, "cpu", 1, codes.append)
    with pytest.raises(DeviceLost, match="illegal address"):
        results(labeler, output.folder.parts[:1])
    assert (codes, list(output.folder.path.iterdir())) == ([], []), "the part is not written"
    monkeypatch.undo()
    results(labeler, output.folder.parts[1:2])
    assert codes == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "0.0.1"},
        {"dataset_sha256": "0" * 64},
        {"images": ImageFolder(Path("/nowhere"))},
        {"manifest": b"of another job\n"},
        {"provenance": {"precision": "int8"}},  # this machine computes in float32
        {"journal": Path("/nowhere/labels.ledger")},
    ],
)
def test_a_machine_without_the_files_of_the_job_is_refused(changes: dict[str, Any], output: Output) -> None:
    with pytest.raises(ConfigError):
        output.label(output.folder.parts[:1], **changes)
    assert list(output.folder.path.iterdir()) == []


def test_a_process_of_a_former_job_writes_nothing(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = PartLabeler(output.job, "cpu", 1)
    results(labeler, output.folder.parts[:1])
    output.job.journal.write_bytes(b"of the next job\n")
    with pytest.raises(ConfigError):
        results(labeler, output.folder.parts[1:2])
    assert [path.name for path in output.folder.path.iterdir()] == [output.folder.parts[0].name]


def test_another_checkpoint_is_refused(output: Output) -> None:
    with pytest.raises(MalError) as caught:
        output.label(output.folder.parts[:1], checkpoint_sha256="0" * 64)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("repeated", ["image", "annotation"])
def test_an_id_that_a_part_uses_twice_is_refused(repeated: str, output: Output, tmp_path: Path) -> None:
    numbers = (0, 0) if repeated == "image" else (0, 1)
    rows = [
        ImageRow(at, {"id": number, "file_name": f"{at}.png"}, [(at, {"id": 5 if repeated == "annotation" else at})])
        for at, number in enumerate(numbers)
    ]
    write_part(tmp_path / "in.parquet", rows, ParquetDataset(output.job.dataset).head)
    dataset = ParquetDataset(tmp_path / "in.parquet")
    with pytest.raises(BadDataset):
        output.label(divide(dataset.row_groups, 4), dataset=dataset.path, dataset_sha256=dataset.sha256)


def test_a_folder_that_cannot_be_written_is_an_output_error(output: Output) -> None:
    with pytest.raises(OutputError):
        output.label(output.folder.parts[:1], output=Path("/nowhere"))


def test_a_fault_of_the_program_ends_the_job_with_its_trace(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_labeler, "label_images", lambda *_, **__: 1 / 0)
    with pytest.raises(MalError, match="ZeroDivisionError"):
        output.label(output.folder.parts[:1])


def test_each_process_reads_the_key_by_itself(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAL_TEST_KEY", "correct horse battery")
    write_job(tmp_path / "sealed", 5, parse_key("env:MAL_TEST_KEY", purpose="encryption", source="environment"))
    spec = spec_of(tmp_path / "sealed", tmp_path, "json").model_copy(update={"decryption_key": "env:MAL_TEST_KEY"})
    labeling = open_labeling_job(spec, "inference", Console.silent())
    sealed: dict[str, Any] = {"checkpoint": str(labeling.path), "checkpoint_sha256": labeling.checkpoint.sha256}
    job = dataclasses.replace(output.job, key="env:MAL_TEST_KEY", **sealed)
    assert "correct horse" not in repr(job) + json.dumps(dataclasses.asdict(job), default=str)
    assert len(output.label(output.folder.parts[:1], key="env:MAL_TEST_KEY", **sealed)) == 1
    with pytest.raises(WrongKey):
        output.label(output.folder.parts[:1], key=None, **sealed)
    monkeypatch.delenv("MAL_TEST_KEY")
    with pytest.raises(ConfigError):
        output.label(output.folder.parts[:1], key="env:MAL_TEST_KEY", **sealed)

"""Commands that read a COCO file give the same results for its parquet form."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mal_client.cli.main import main

from mal_train.core.coco.annotations import read_coco
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.parquet_writer import write_part
from mal_train.core.coco.stream import copy_coco
from tests.mal_client.datasets import Dataset, make_dataset, with_masks
from tests.mal_client.fake_server import FakeServer, serving


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Seven images in no order: one is missing, one row has no box, one no known image, one is a crowd."""
    dataset = make_dataset(tmp_path, images=7)
    (dataset.images_dir / "image_2.png").unlink()
    rows = dataset.coco["annotations"]
    rows[0]["iscrowd"] = 1
    rows[7]["bbox"] = "none"
    rows[9]["image_id"] = 99
    rows.reverse()
    dataset.coco["images"].append({"id": 8, "file_name": "image_7.png"})
    dataset.save()
    return dataset


@pytest.fixture
def address() -> Iterator[str]:
    with serving(FakeServer()) as address:
        yield address


def packed(dataset: Dataset) -> Path:
    """Returns a folder with the file in two parts."""
    whole, folder = dataset.folder / "whole.parquet", dataset.folder / "in.parquet"
    copy_coco(dataset.json_path, whole, row_group_boxes=3)
    source = ParquetDataset(whole)
    folder.mkdir(exist_ok=True)
    for part in range(2):
        write_part(folder / f"{part}.parquet", source.rows(source.row_groups[part::2]), source.head)
    return folder


def run(command: str, annotations: Path, dataset: Dataset, output: Path, *more: str) -> int:
    given = ["--annotations", str(annotations), "--images", str(dataset.images_dir), "--output", str(output)]
    return main([command, *given, *more])


def test_check_reports_the_same_issues(dataset: Dataset) -> None:
    reports = []
    for number, path in enumerate((dataset.json_path, packed(dataset))):
        output = dataset.folder / f"{number}.report.json"
        assert run("check", path, dataset, output) == 3
        reports.append(json.loads(output.read_text().replace(str(path), "FILE")))
    assert reports[0] == reports[1]


def test_labels_are_written_as_json_with_the_same_bytes(dataset: Dataset, address: str) -> None:
    outputs = dataset.folder / "a.json", dataset.folder / "b.json"
    for path, output in zip((dataset.json_path, packed(dataset)), outputs, strict=True):
        assert run("label", path, dataset, output, "--server", address) == 3
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    errors = [output.with_suffix(".errors.jsonl").read_bytes() for output in outputs]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("is_packed", [False, True])
def test_labels_are_written_as_parquet(dataset: Dataset, address: str, *, is_packed: bool) -> None:
    run("label", dataset.json_path, dataset, dataset.output, "--server", address)
    source = packed(dataset) if is_packed else dataset.json_path
    output = dataset.folder / "out.parquet"
    assert run("label", source, dataset, output, "--server", address) == 3
    assert json.dumps(read_coco(output).raw) == json.dumps(json.loads(dataset.output.read_text()))


def test_shards_of_parquet_are_merged_into_json(dataset: Dataset, address: str) -> None:
    single, merged, source = dataset.folder / "single.json", dataset.output, packed(dataset)
    assert run("label", source, dataset, single, "--server", address) == 3
    for shard in range(2):
        assert run("label", source, dataset, merged, "--server", address, "--shard", f"{shard}/2") in (0, 3)
    assert main(["merge", "--annotations", str(source), "--output", str(merged), "--shards", "2"]) == 3
    assert merged.read_bytes() == single.read_bytes()


def test_evaluations_are_equal(tmp_path: Path, address: str) -> None:
    dataset = with_masks(make_dataset(tmp_path))
    results = []
    for number, path in enumerate((dataset.json_path, packed(dataset))):
        output = dataset.folder / f"{number}.result.json"
        assert run("evaluate", path, dataset, output, "--server", address) == 0
        results.append(json.loads(output.read_text()))
    assert results[0] == results[1]


def test_review_and_export_give_the_same_files(dataset: Dataset, address: str) -> None:
    run("label", dataset.json_path, dataset, dataset.output, "--server", address)
    labeled = dataset.folder / "labeled.parquet"
    copy_coco(dataset.output, labeled)
    written: list[dict[str, bytes]] = []
    for number, path in enumerate((dataset.output, labeled)):
        folder = dataset.folder / f"files{number}"
        assert run("export", path, dataset, folder, "--to", "yolo-seg") == 3
        assert run("review", path, dataset, folder / "queue.json", "--export", str(folder / "worst.json")) == 0
        found = (file for file in folder.rglob("*") if file.is_file())
        written.append({str(file.relative_to(folder)): file.read_bytes() for file in found})
    assert written[0] == written[1]
    assert len(written[0]) > 5

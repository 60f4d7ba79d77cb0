"""`mal-client convert` between the forms of a COCO file."""

import json
from pathlib import Path
from typing import Any

import pytest
from mal_client.cli.common import EXIT_SOME_FAILED
from mal_client.cli.main import main

from mal_train.core.coco.json_file import errors_path
from mal_train.core.coco.parquet_reader import ParquetDataset
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset, make_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path, images=7)


def convert(source: Path, output: Path, *more: str) -> int:
    return main(["convert", "--from", "coco", "--labels", str(source), "--output", str(output), *more])


def errors_of(dataset: Dataset) -> list[dict[str, str]]:
    return [json.loads(line) for line in errors_path(dataset.output).read_text().splitlines()]


def test_json_becomes_parquet_and_json_again(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    packed, back = dataset.folder / "in.parquet", dataset.folder / "back.json"
    assert convert(dataset.json_path, packed, "--row-group-boxes", "4") == 0
    assert "7 images, 14 annotations, 4 row groups" in capsys.readouterr().out
    assert [group.annotations for group in ParquetDataset(packed).row_groups] == [4, 4, 4, 2]
    assert convert(packed, back) == 0
    assert json.loads(back.read_text()) == dataset.coco


def test_progress_is_shown_while_rows_are_read_and_written(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_client.cli.convert.LINE_EVERY_S", 0)
    monkeypatch.setattr("mal_client.cli.convert.ROWS_PER_LOOK", 7)
    assert convert(dataset.json_path, dataset.folder / "in.parquet", "--row-group-boxes", "5") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("convert: ")]
    assert [sum(word.isdecimal() for word in line.split()) for line in lines] == [2, 2, 2, 3, 3]


def test_parquet_is_written_again_with_other_row_groups(dataset: Dataset) -> None:
    packed, large = dataset.folder / "in.parquet", dataset.folder / "large.parquet"
    assert convert(dataset.json_path, packed, "--row-group-boxes", "1") == 0
    assert convert(packed, large) == 0
    assert [len(ParquetDataset(path).row_groups) for path in (packed, large)] == [7, 1]


def test_boxes_of_other_formats_become_parquet(dataset: Dataset) -> None:
    (dataset.folder / "boxes.csv").write_text("filename,xmin,ymin,xmax,ymax,class\nimage_0.png,1,2,11,22,cup\n")
    given = ["--labels", str(dataset.folder / "boxes.csv"), "--images", str(dataset.images_dir)]
    assert main(["convert", "--from", "csv", *given, "--output", str(dataset.folder / "out.parquet")]) == 0
    (image,) = ParquetDataset(dataset.folder / "out.parquet").rows()
    assert (image.image["file_name"], image.annotations[0][1]["bbox"]) == ("image_0.png", [1, 2, 10, 20])


@pytest.mark.parametrize(
    "more",
    [["--images", "."], ["--columns", "a"], ["--row-group-boxes", "0"]],
)
def test_options_that_do_not_apply_are_refused(dataset: Dataset, more: list[str]) -> None:
    assert convert(dataset.json_path, dataset.folder / "out.parquet", *more) == 2
    assert not (dataset.folder / "out.parquet").exists()


def test_row_groups_of_json_are_refused(dataset: Dataset) -> None:
    assert convert(dataset.json_path, dataset.folder / "out.json", "--row-group-boxes", "5") == 2


def test_other_formats_need_their_images(dataset: Dataset) -> None:
    (dataset.folder / "boxes.csv").write_text("filename,xmin,ymin,xmax,ymax\n")
    given = ["--labels", str(dataset.folder / "boxes.csv"), "--output", str(dataset.output)]
    assert main(["convert", "--from", "csv", *given]) == 2


def test_the_input_is_not_replaced(dataset: Dataset) -> None:
    assert convert(dataset.json_path, dataset.json_path) == 2


@pytest.mark.parametrize("form", ["corners", "shares"])
def test_boxes_that_cannot_have_the_stated_form_are_named(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    for row in dataset.coco["annotations"]:
        row["bbox"] = [0.25, 0.25, 0.5, 0.75]
    dataset.coco["annotations"][2]["bbox"] = [20, 2, 10, 8]
    dataset.save()
    assert convert(dataset.json_path, dataset.output, "--box-form", form) == EXIT_SOME_FAILED
    errors = capsys.readouterr().err
    assert "annotation 102" in errors
    assert "annotation 101" not in errors


BAD_BOXES = [
    *([1, 2, 3], ["1", 2, 30, 40], None, [1, 2, float("inf"), 4], [1, True, 30, 40], [float("nan"), 2, 3, 4]),
    *([30, 20, 10, 60], "x", [-1e308, 0, 1e308, 5]),
]


def strict_json(path: Path) -> Any:
    """Reads JSON as RFC 8259 defines it, without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} contains {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("form", ["corners", "shares"])
def test_bad_boxes_are_listed_and_left_out(dataset: Dataset, form: str) -> None:
    rows = dataset.coco["annotations"]
    rows[:] = [{**rows[0], "id": number, "bbox": box} for number, box in enumerate(BAD_BOXES)]
    rows += [None, {**rows[0], "id": 99, "bbox": [0.125, 0.25, 0.5, 0.75], "area": 0.375}]
    dataset.save()
    assert convert(dataset.json_path, dataset.output, "--box-form", form) == EXIT_SOME_FAILED
    (kept,) = strict_json(dataset.output)["annotations"]
    box = [0.125, 0.25, 0.375, 0.5] if form == "corners" else [WIDTH / 8, HEIGHT / 4, WIDTH / 2, HEIGHT * 3 / 4]
    assert (kept["id"], kept["bbox"], kept["area"]) == (99, box, box[2] * box[3])
    listed = errors_of(dataset)
    name = dataset.json_path.name
    assert [row["where"] for row in listed] == [
        *(f"{name}:annotation {number}" for number in range(len(BAD_BOXES))),
        f"{name}:annotations[{len(BAD_BOXES)}]",
    ]
    assert [row["reason"] for row in listed] == [*["BAD_BOX"] * len(BAD_BOXES), "NOT_AN_OBJECT"]
    assert "[1, 2, 3]" in listed[0]["message"]


def test_shares_of_an_image_without_size_are_listed_and_the_others_converted(dataset: Dataset) -> None:
    for row in dataset.coco["annotations"]:
        row["bbox"] = [0.25, 0.25, 0.5, 0.5]
    del dataset.coco["images"][0]["width"]
    dataset.coco["annotations"][2]["image_id"] = "gone"
    dataset.save()
    assert convert(dataset.json_path, dataset.output, "--box-form", "shares") == EXIT_SOME_FAILED
    assert [row["reason"] for row in errors_of(dataset)] == ["IMAGE_UNUSABLE", "IMAGE_UNUSABLE", "IMAGE_UNKNOWN"]
    assert len(strict_json(dataset.output)["annotations"]) == 11


def test_the_list_of_errors_of_an_earlier_conversion_does_not_stay(dataset: Dataset) -> None:
    dataset.coco["annotations"][0]["bbox"] = None
    dataset.save()
    assert convert(dataset.json_path, dataset.output, "--box-form", "corners") == EXIT_SOME_FAILED
    for row in dataset.coco["annotations"]:
        row["bbox"] = [1, 1, 5, 5]
    dataset.save()
    assert convert(dataset.json_path, dataset.output, "--box-form", "corners") == 0
    assert not errors_path(dataset.output).exists()


@pytest.mark.parametrize(
    "box", [[0.5, 0.5, -0.2, 0.2], [0.5, 0.5, 0.2, 0], [1, 1, 1, 1], [-0.5, 0, 0.5, 0.5], [0.7, 0.1, 0.5, 0.2]]
)
def test_shares_of_no_place_in_the_image_are_named(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], box: list[float]
) -> None:
    for row in dataset.coco["annotations"]:
        row["bbox"] = [0.25, 0.25, 0.75, 0.755]  # as rounded by other tools
    dataset.coco["annotations"][2]["bbox"] = box
    dataset.save()
    assert convert(dataset.json_path, dataset.output, "--box-form", "shares") == EXIT_SOME_FAILED
    errors = capsys.readouterr().err
    assert "annotation 102" in errors
    assert "annotation 101" not in errors


@pytest.mark.parametrize("name", ["none.json", "none.parquet"])
def test_a_missing_input_is_one_error(dataset: Dataset, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert convert(dataset.folder / name, dataset.folder / "out.parquet") == 2
    assert name in capsys.readouterr().err

"""Names that begin or end with a space: images and classes come back from every export as they were."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from mal_client.cli.main import main

from tests.mal_client.datasets import Dataset, make_dataset, with_masks
from tests.mal_client.formats.conversions import boxes, convert, make_images, reasons

NAMES = ["a.png", " a.png", " lead.png", "trail .png", "end.png ", "dir /x.png", " dir/y.png"]
CLASSES = ["cup", " cup", "cup "]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = with_masks(make_dataset(tmp_path, images=len(NAMES), boxes=1))
    coco = dataset.coco
    coco["categories"] = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    for number, (image, row, name) in enumerate(zip(coco["images"], coco["annotations"], NAMES, strict=True)):
        path = dataset.images_dir / name
        path.parent.mkdir(exist_ok=True)
        (dataset.images_dir / image["file_name"]).rename(path)
        image["file_name"], row["category_id"] = name, 1 + number % len(CLASSES)
        row |= {"score": 0.5, "flags": []}
    dataset.save()
    return dataset


def objects(path: Path) -> list[tuple[str, str]]:
    """Returns image and class of each annotation, sorted."""
    coco: dict[str, Any] = json.loads(path.read_text())
    images = {row["id"]: row["file_name"] for row in coco["images"]}
    classes = {row["id"]: row["name"] for row in coco["categories"]}
    return sorted((images[row["image_id"]], classes[row["category_id"]]) for row in coco["annotations"])


@pytest.mark.parametrize(
    ("target", "source", "labels"),
    [("labelme", "labelme", ""), ("yolo-seg", "yolo", "labels"), ("cvat", "cvat", "annotations.xml")],
)
def test_names_come_back_from_an_export(dataset: Dataset, target: str, source: str, labels: str) -> None:
    given, folder = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)], dataset.folder / "o"
    if target == "cvat":
        assert main(["review", *given, "--worst", "99", "--cvat", str(folder)]) == 0
    else:
        assert main(["export", "--to", target, *given, "--output", str(folder)]) == 0
    read = ["--labels", str(folder / labels), "--images", str(dataset.images_dir), "--output", str(dataset.output)]
    assert main(["convert", "--from", source, *read]) == 0
    assert objects(dataset.output) == objects(dataset.json_path)


@pytest.mark.parametrize("prefix", ["/data/local-files/?d=", "s3://bucket/images/", "http://127.0.0.1/images/"])
def test_names_come_back_from_label_studio(dataset: Dataset, prefix: str) -> None:
    given, path = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)], dataset.folder / "t"
    assert main(["review", *given, "--worst", "99", "--label-studio", str(path), "--image-prefix", prefix]) == 0
    tasks = json.loads(path.read_text())
    done = [{**task, "id": n, "annotations": [{"id": n, **task["predictions"][0]}]} for n, task in enumerate(tasks)]
    path.write_text(json.dumps(done))
    read = ["--labels", str(path), "--images", str(dataset.images_dir), "--output", str(dataset.output)]
    assert main(["convert", "--from", "label-studio", *read]) == 0
    assert objects(dataset.output) == objects(dataset.json_path)


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("is_first", [True, False])
def test_names_in_a_table_are_found_or_listed(tmp_path: Path, quoting: Any, is_first: bool) -> None:
    make_images(tmp_path, *(name for name in NAMES if name != "end.png "))
    rows: list[list[Any]] = [
        ["file_name", "x", "y", "w", "h", "class"],
        *([name, 1, 2, 3, 4, "cup, red"] for name in NAMES),
    ]
    with (tmp_path / "boxes.csv").open("w", newline="") as file:
        csv.writer(file, quoting=quoting).writerows(row if is_first else row[::-1] for row in rows)
    assert convert(tmp_path, "csv", labels="boxes.csv") == 3
    # Spaces may belong to a delimiter: " a.png" may be both. The last one has no file.
    assert reasons(tmp_path) == [("boxes.csv:3", "BAD_IMAGE"), ("boxes.csv:6", "BAD_IMAGE")]
    assert sorted(boxes(tmp_path)) == sorted({*NAMES} - {" a.png", "end.png "})


def test_a_space_after_the_delimiter_is_no_part_of_a_name_that_has_no_file(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png")
    (tmp_path / "boxes.csv").write_text(
        'class, file_name, x, y, w, h\n"cup", a.png, 1, 2, 3, 4\ncup, "a.png",1,2,3,4\n'
    )
    assert convert(tmp_path, "csv", labels="boxes.csv") == 0
    assert boxes(tmp_path) == {"a.png": [("cup", [1, 2, 3, 4])] * 2}


def test_identifiers_in_a_table_are_found_with_their_spaces(tmp_path: Path) -> None:
    make_images(tmp_path, " a.png", "b .png")
    (tmp_path / "boxes.csv").write_text("ImageID,xmin,ymin,xmax,ymax\n a,1,2,9,9\nb ,1,2,9,9\n")
    assert convert(tmp_path, "csv", labels="boxes.csv") == 0
    assert sorted(boxes(tmp_path)) == [" a.png", "b .png"]


VOC = """<annotation><filename>{}</filename><size><width>80</width><height>50</height></size><object><name>cup</name>
<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>11</xmax><ymax>22</ymax></bndbox></object></annotation>"""


def test_voc_finds_the_image_of_the_exact_name(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", " a.png", "b.png")
    for file, stated in ((" a", " a.png"), ("a", "\n a.png \n"), ("b", "b.png ")):
        (tmp_path / "labels" / f"{file}.xml").write_text(VOC.format(stated).replace("\n a", "\na"))
    (tmp_path / "train.txt").write_text(" a\nb \n")
    assert convert(tmp_path, "voc") == 0
    assert sorted(boxes(tmp_path)) == [" a.png", "a.png", "b.png"]
    assert convert(tmp_path, "voc", "--image-set", str(tmp_path / "train.txt")) == 0
    assert sorted(boxes(tmp_path)) == [" a.png", "b.png"]

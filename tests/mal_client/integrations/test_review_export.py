"""Tests of the export of the worst masks to Label Studio and CVAT."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from mal_client.cli.main import main
from mal_client.integrations.label_studio.label_config import read_label_config
from mal_client.integrations.label_studio.regions import read_rectangle

from deploy.demo.baselines import box_filled
from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import decode_mask
from tests.mal_client.datasets import HEIGHT, WIDTH, Dataset
from tests.mal_client.integrations.cvat.test_job import decoded
from tests.mal_client.integrations.label_studio.rle_pack import decode_brush
from tests.mal_client.review.test_queue import with_scores


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return with_scores(tmp_path)


def exported(dataset: Dataset, *more: str) -> tuple[Any, ElementTree.Element]:
    """Exports the worst four (103, which failed, 104, 101, 102); returns (Label Studio tasks, CVAT annotations)."""
    given = ["review", "--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), "--worst", "4"]
    files = ["--label-studio", str(dataset.folder / "tasks.json"), "--cvat", str(dataset.folder / "cvat")]
    assert main([*given, *files, *more]) == 0
    root = ElementTree.fromstring((dataset.folder / "cvat" / "annotations.xml").read_text())
    return json.loads((dataset.folder / "tasks.json").read_text()), root


def expected(dataset: Dataset, annotation: int) -> Any:
    row = next(row for row in dataset.coco["annotations"] if row["id"] == annotation)
    return decode_mask(box_filled(tuple(map(float, row["bbox"])), (HEIGHT, WIDTH)))  # type: ignore[arg-type]


def test_label_studio_gets_a_task_per_image_worst_first(dataset: Dataset) -> None:
    tasks, _ = exported(dataset, "--image-prefix", "/data/local-files/?d=set/")
    assert [task["data"]["review_rank"] for task in tasks] == [1, 2, 3]
    assert tasks[0]["data"]["image"] == "/data/local-files/?d=set/image_1.png"
    assert tasks[0]["data"]["reasons"] == "1: no such file; 4: low score"
    regions = {row["id"]: row for task in tasks for row in task["predictions"][0]["result"]}
    assert sorted(regions) == ["1-box", "2-box", "2-mask", "3-box", "3-mask", "4-box", "4-mask"], "103 has no mask"
    assert (decode_brush(regions["2-mask"]["value"]["rle"], HEIGHT, WIDTH) == expected(dataset, 104)).all()
    assert read_rectangle(regions["2-box"]).box == tuple(dataset.coco["annotations"][4]["bbox"])
    assert tasks[2]["predictions"][0]["score"] == 0.2


def test_the_configuration_beside_the_tasks_has_controls_for_their_regions(dataset: Dataset) -> None:
    tasks, _ = exported(dataset)
    config = read_label_config((dataset.folder / "tasks.config.xml").read_text())
    for region in tasks[0]["predictions"][0]["result"]:
        assert region["to_name"] in config.image_fields
        assert region["from_name"] in {*config.boxes, config.masks["image"].name}
    assert config.boxes["box"].labels == config.masks["image"].labels == ("cup",)


def test_cvat_gets_boxes_and_exact_masks(dataset: Dataset) -> None:
    _, root = exported(dataset)
    assert [image.get("name") for image in root.iter("image")] == ["image_1.png", "image_2.png", "image_0.png"]
    masks = list(root.iter("mask"))
    assert [mask.get("group_id") for mask in masks] == ["4", "2", "3"]
    numbers = [[int(mask.get(key, "")) for key in ("left", "top", "width", "height")] for mask in masks]
    for mask, (left, top, width, height), annotation in zip(masks, numbers, (102, 104, 101), strict=True):
        runs = [int(run) for run in re.split(", ", mask.get("rle", ""))]
        points = [*runs, left, top, left + width - 1, top + height - 1]
        assert (decoded(points, HEIGHT, WIDTH) == expected(dataset, annotation)).all()
    box = next(root.iter("box"))
    assert [float(box.get(key, "")) for key in ("xtl", "ytl", "xbr", "ybr")] == [2.0, 2.0, 12.0, 11.0]
    assert json.loads((dataset.folder / "cvat" / "labels.json").read_text())[0]["name"] == "cup"
    listed = (dataset.folder / "cvat" / "images.txt").read_text().splitlines()
    assert listed[0] == str(dataset.images_dir / "image_1.png")


@pytest.mark.parametrize("end", ["\n/etc/hostname", "\r/etc/hostname"])
def test_no_file_name_adds_a_file_to_the_list_for_cvat(dataset: Dataset, end: str) -> None:
    dataset.coco["images"][1]["file_name"] += end
    dataset.save()
    folder = dataset.folder / "cvat"
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir), "--cvat", str(folder)]
    assert main(["review", *given]) == BadDataset.exit_code
    assert not (folder / "images.txt").exists()


@pytest.mark.parametrize("tool", ["--cvat", "--label-studio"])
def test_a_category_that_xml_cannot_hold_is_refused_before_a_file_is_written(dataset: Dataset, tool: str) -> None:
    dataset.coco["categories"][0]["name"] = "cup\x1b"
    dataset.save()
    given = ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    assert main(["review", *given, tool, str(dataset.folder / "out")]) == BadDataset.exit_code
    assert not list(dataset.folder.glob("out*/*.xml")) + list(dataset.folder.glob("out*.xml"))


def test_missing_sizes_are_read_from_the_image_files(dataset: Dataset) -> None:
    for image in dataset.coco["images"]:
        del image["width"], image["height"]
    dataset.save()
    tasks, root = exported(dataset)
    assert tasks[0]["predictions"][0]["result"][0]["original_width"] == WIDTH
    assert next(root.iter("image")).get("height") == str(HEIGHT)


def test_annotations_without_an_image_are_omitted_and_counted(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.coco["annotations"][3]["image_id"] = 77
    dataset.save()
    tasks, _ = exported(dataset)
    assert "1 annotations omitted" in capsys.readouterr().out
    assert tasks[0]["data"]["review_rank"] == 2


def test_polygons_of_the_labeled_file_are_exported(dataset: Dataset) -> None:
    dataset.coco["annotations"][4]["segmentation"] = [[3, 3, 9, 3, 9, 8, 3, 8]]
    dataset.save()
    tasks, _ = exported(dataset)
    region = next(row for task in tasks for row in task["predictions"][0]["result"] if row["id"] == "2-mask")
    mask = decode_brush(region["value"]["rle"], HEIGHT, WIDTH)
    assert mask.sum() == 30
    assert np.array_equal(np.argwhere(mask)[0], [3, 3])

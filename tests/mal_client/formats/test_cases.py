"""Files of boxes in the shape of public reports, converted by their command; the images are COCO's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mal_client.cli.main import main

from tests.reference import shared

NAMES = ["000000000632", "000000000776", "000000000872", "000000000885"]


@pytest.fixture
def truth() -> dict[str, list[list[float]]]:
    """Returns the boxes of each image, in px, from which the files of every format were made."""
    coco = json.loads(shared("cases", "coco", "base_boxes.json").read_text())
    names = {image["id"]: Path(image["file_name"]).stem for image in coco["images"]}
    found: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for row in coco["annotations"]:
        found[names[row["image_id"]]].append(row["bbox"])
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(shared("data", "coco_val_dev", "images", f"{name}.jpg"), folder)
    return folder


def converted(images: Path, *arguments: object, exit_code: int = 0) -> dict[str, Any]:
    output = images.parent / "out.json"
    given = ["convert", *map(str, arguments), "--images", str(images), "--output", str(output)]
    assert main(given) == exit_code
    coco: dict[str, Any] = json.loads(output.read_text())
    return coco


def boxes_of(coco: dict[str, Any]) -> dict[str, list[list[float]]]:
    names = {image["id"]: Path(image["file_name"]).stem for image in coco["images"]}
    found: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for row in coco["annotations"]:
        found[names[row["image_id"]]].append(row["bbox"])
    return found


def assert_close(found: dict[str, list[list[float]]], truth: dict[str, list[list[float]]], px: float) -> None:
    assert {name: len(rows) for name, rows in found.items()} == {name: len(rows) for name, rows in truth.items()}
    for name, rows in truth.items():
        for row, other in zip(found[name], rows, strict=True):
            assert row == pytest.approx(other, abs=px), name


def test_voc_gbk(images: Path) -> None:
    coco = converted(images, "--from", "voc", "--labels", shared("cases", "voc_gbk"))
    assert boxes_of(coco)[NAMES[0]] == [[245, 230, 105, 88]]


def test_voc_sub(images: Path, truth: dict[str, list[list[float]]]) -> None:
    for number, name in enumerate(NAMES):
        (images / f"cam{number}").mkdir()
        (images / f"{name}.jpg").rename(images / f"cam{number}" / "frame_0001.jpg")
    coco = converted(images, "--from", "voc", "--labels", shared("cases", "voc_sub"))
    by_camera: dict[int, list[list[float]]] = {}
    folders = {image["id"]: Path(image["file_name"]).parent.name for image in coco["images"]}
    for row in coco["annotations"]:
        by_camera.setdefault(int(folders[row["image_id"]][-1]), []).append(row["bbox"])
    assert_close({NAMES[number]: rows for number, rows in by_camera.items()}, truth, 1.0)


def test_yolo_conf_and_names_bom(images: Path, truth: dict[str, list[list[float]]]) -> None:
    names = shared("cases", "names_bom.txt")
    coco = converted(images, "--from", "yolo", "--labels", shared("cases", "yolo_conf"), "--names", names)
    assert_close(boxes_of(coco), truth, 1.0)
    assert coco["categories"][0]["name"] == "bed"
    assert {row["score"] for row in coco["annotations"]} == {0.876543}


def test_yolo_pose(images: Path, truth: dict[str, list[list[float]]]) -> None:
    folder = shared("cases", "yolo_pose")
    coco = converted(images, "--from", "yolo", "--labels", folder, "--names", folder / "tiger-pose.yaml")
    assert_close(boxes_of(coco), truth, 1.0)
    assert all(len(row["keypoints"]) == 12 * 3 and "segmentation" not in row for row in coco["annotations"])


def test_csv_roboflow_resized(images: Path) -> None:
    path = shared("cases", "csv", "roboflow_resized.csv")
    coco = converted(images, "--from", "csv", "--labels", path, exit_code=3)
    assert coco["annotations"] == []
    errors = [json.loads(line) for line in (images.parent / "out.errors.jsonl").read_text().splitlines()]
    assert [(row["where"], row["reason"]) for row in errors] == [
        (f"{path.name}:{line}", "IMAGE_SIZE_MISMATCH") for line in range(2, 16)
    ]


def test_csv_openimages_renamed(images: Path, truth: dict[str, list[list[float]]]) -> None:
    coco = converted(images, "--from", "csv", "--labels", shared("cases", "csv", "openimages_renamed.csv"))
    assert_close(boxes_of(coco), truth, 1.0)

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mal_train.core.coco.annotations import parse_coco, read_coco, row_name
from mal_train.core.coco.left_out import LeftOut
from mal_train.core.errors import BadDataset
from mal_train.core.settings import Compat
from mal_train.data import annotations
from mal_train.data.annotations import Supervision, TrainingBoxes, epoch_order, read_training_boxes, select_boxes
from tests.reference import fixture
from tests.scenes import write_scenes


def read(path: Path, image_dir: Path, **changes: Any) -> TrainingBoxes:
    settings: dict[str, Any] = {"min_area": 0.0, "max_area": 1e10, "compat": Compat.NONE, **changes}
    return read_training_boxes(path, image_dir, **settings)


def test_the_published_filter_keeps_the_published_boxes(tmp_path: Path) -> None:
    published = json.loads(fixture("l_filter.json").read_text())
    (tmp_path / "a.png").write_bytes(b"not an image")
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": published["width"], "height": published["height"]}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": box}
            for n, box in enumerate(published["bboxes"], start=1)
        ],
    }
    boxes = select_boxes(parse_coco(coco), tmp_path, min_area=2048, max_area=1e10, compat=Compat.TAO)
    kept = [tuple(published["bboxes"][n - 1]) for n in published["train_kept"]]
    assert [boxes.box(n) for n in range(len(boxes))] == kept


def test_boxes_beyond_the_image_edge_are_clipped_not_discarded(tmp_path: Path) -> None:
    def exceed_the_image(coco: dict[str, Any]) -> None:
        coco["annotations"][0]["bbox"] = [-10, -10, 40, 40]

    boxes = read(*write_scenes(tmp_path, images=1, change=exceed_the_image))
    assert boxes.box(0) == (0.0, 0.0, 30.0, 30.0)


def test_excluded_boxes_are_counted_by_reason(tmp_path: Path) -> None:
    def damage(coco: dict[str, Any]) -> None:
        rows = coco["annotations"]
        rows[0]["iscrowd"] = 1
        rows[1]["bbox"] = [0, 0, 3, 3]
        rows[2]["bbox"] = [1000, 1000, 30, 30]
        rows[3]["image_id"] = 99
        coco["images"][2]["file_name"] = "gone.png"

    boxes = read(*write_scenes(tmp_path, change=damage), min_area=100.0)
    assert len(boxes) == 2
    assert boxes.left_out.counts == {
        "CROWD": 1,
        "BOX_TOO_SMALL": 1,
        "BAD_BOX": 1,
        "IMAGE_UNKNOWN": 1,
        "IMAGE_NOT_FOUND": 2,
    }
    summary = boxes.summary()
    assert "2 of 8 boxes" in summary
    assert "2 IMAGE_NOT_FOUND" in summary


def test_rows_that_are_left_out_are_named_with_their_file_and_reason(tmp_path: Path) -> None:
    def damage(coco: dict[str, Any]) -> None:
        coco["annotations"][1]["bbox"] = [0, 0, 3, 3]
        coco["annotations"][2]["bbox"] = [1000, 1000, 30, 30]
        coco["annotations"].append(5)
        coco["images"][2]["file_name"] = "gone.png"
        coco["images"][3]["file_name"] = "text.png"
        del coco["images"][3]["width"]

    annotations_file, folder = write_scenes(tmp_path, change=damage)
    (folder / "text.png").write_text("not an image")
    rows = json.loads(annotations_file.read_text())["annotations"]
    title, *lines = read(annotations_file, folder, min_area=100.0).notes("boxes.json")
    assert title.startswith("boxes.json: ")
    by_reason = dict(line.strip().split(": ", 1) for line in lines)
    assert by_reason.keys() == {"BOX_TOO_SMALL", "BAD_BOX", "IMAGE_NOT_FOUND", "IMAGE_FORMAT", "NOT_AN_OBJECT"}
    for reason, row, named in (
        ("BOX_TOO_SMALL", 1, "min_obj_size"),
        ("BAD_BOX", 2, "1000"),
        ("IMAGE_NOT_FOUND", 4, str(folder / "gone.png")),
        ("IMAGE_FORMAT", 6, str(folder / "text.png")),
    ):
        assert by_reason[reason].startswith(f"annotation {rows[row]['id']}: ")
        assert named in by_reason[reason]
    assert "annotations[8]" in by_reason["NOT_AN_OBJECT"]


def test_no_image_is_opened_for_rows_that_are_left_out_without_it(tmp_path: Path) -> None:
    def damage(coco: dict[str, Any]) -> None:
        coco["images"][0]["file_name"] = "gone.png"
        coco["annotations"][0]["iscrowd"] = 1
        coco["annotations"][1]["bbox"] = None

    boxes = read(*write_scenes(tmp_path, images=2, change=damage))
    assert boxes.left_out.counts == {"CROWD": 1, "BAD_BOX": 1}
    assert [line.partition(": ")[0] for line in boxes.notes("a.json")] == ["a.json", "  BAD_BOX"]


def test_boxes_that_are_not_taken_are_counted_beside_those_left_out(tmp_path: Path) -> None:
    def add_crowd(coco: dict[str, Any]) -> None:
        coco["annotations"][0]["iscrowd"] = 1

    boxes = read(*write_scenes(tmp_path, images=2, change=add_crowd))
    assert "not needed" not in boxes.summary()
    few = boxes.take(np.arange(len(boxes) - 1))
    assert few.summary(reasons=False).endswith("; excluded: 1; not needed for these steps: 1")


def test_crowd_regions_alone_are_only_counted(tmp_path: Path) -> None:
    def add_crowd(coco: dict[str, Any]) -> None:
        coco["annotations"][0]["iscrowd"] = 1

    boxes = read(*write_scenes(tmp_path, images=2, change=add_crowd))
    assert "1 CROWD" in boxes.summary()
    assert boxes.notes("a.json") == []


@pytest.mark.parametrize("supervision", ["mask", "auto", "pseudo"])
def test_a_mask_that_cannot_be_used_is_named(supervision: Supervision, tmp_path: Path) -> None:
    def damage(coco: dict[str, Any]) -> None:
        outside = [[900, 900, 950, 900, 950, 950]]
        for row, mask in zip(coco["annotations"], ([[1, 2, 3]], outside, None), strict=False):
            row["segmentation"] = mask

    path, folder = write_scenes(tmp_path, change=damage)
    boxes = select_boxes(
        read_coco(path), folder, min_area=0, max_area=1e10, compat=Compat.NONE, supervision=supervision
    )
    named = {"BAD_GROUND_TRUTH": 1, "EMPTY_GROUND_TRUTH": 1}
    if supervision == "mask":
        assert boxes.left_out.counts == {**named, "NO_GROUND_TRUTH": 1}
        assert not boxes.masks_left_out.counts
    else:
        assert not boxes.left_out.counts
        assert boxes.masks_left_out.counts == named
    assert sum(mask is not None for mask in boxes.masks) == 5
    name = row_name(json.loads(path.read_text())["annotations"][1]["id"])
    assert any(f"EMPTY_GROUND_TRUTH: {name}: " in line for line in boxes.notes("boxes.json"))


def change_boxes(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Returns a change of a COCO file: fields of all annotations."""

    def change(coco: dict[str, Any]) -> None:
        for row in coco["annotations"]:
            row.update(fields)

    return change


def rename_images(coco: dict[str, Any]) -> None:
    for image in coco["images"]:
        image["file_name"] = "gone.png"


@pytest.mark.parametrize(
    ("change", "reason", "remedy"),
    [
        (change_boxes(bbox=[1, 1, 3, 3]), "BOX_TOO_SMALL", "min_obj_size"),
        (change_boxes(bbox=[0, 0, 90, 80]), "BOX_TOO_LARGE", "max_obj_size"),
        (change_boxes(iscrowd=1), "CROWD", "crowd_as_objects"),
        (change_boxes(attributes={"rotation": 30}), "BOX_ROTATED", "rotated_boxes"),
        (change_boxes(bbox=[1, 1, 0, 3]), "BAD_BOX", "mal-client check"),
        (change_boxes(image_id=77), "IMAGE_UNKNOWN", "mal-client check"),
        (rename_images, "IMAGE_NOT_FOUND", "dataset.train_img_dir"),
    ],
)
def test_the_remedy_for_a_file_without_usable_boxes_fits_the_reason(
    change: Callable[[dict[str, Any]], None], reason: str, remedy: str, tmp_path: Path
) -> None:
    all_remedies = {"min_obj_size;", "max_obj_size;", "crowd_as_objects", "rotated_boxes=", "dataset.train_img_dir and"}
    with pytest.raises(BadDataset) as error:
        read(*write_scenes(tmp_path, change=change), min_area=100.0, max_area=6000.0)
    before_example = str(error.value).partition(". The first: ")[0]
    assert f"8 {reason}" in before_example
    assert remedy in before_example
    assert not any(other in before_example for other in all_remedies if remedy not in other)


def test_a_file_without_annotations_is_refused_for_that_alone(tmp_path: Path) -> None:
    with pytest.raises(BadDataset) as error:
        read(*write_scenes(tmp_path, change=lambda coco: coco["annotations"].clear()))
    assert "annotations" in str(error.value)
    assert "obj_size" not in str(error.value)


def test_a_missing_image_size_is_read_from_the_image(tmp_path: Path) -> None:
    def remove_sizes(coco: dict[str, Any]) -> None:
        for image in coco["images"]:
            del image["width"], image["height"]

    assert read(*write_scenes(tmp_path, change=remove_sizes)).size_wh.tolist() == [[96, 80]] * 4


def test_every_epoch_is_a_different_permutation_of_the_boxes(tmp_path: Path) -> None:
    boxes = read(*write_scenes(tmp_path, images=10))
    first, repeated, second = (epoch_order(boxes, 7, epoch) for epoch in (0, 0, 1))
    assert sorted(first) == list(range(len(boxes)))
    assert first.tolist() == repeated.tolist()
    assert first.tolist() != second.tolist()
    assert first.tolist() != epoch_order(boxes, 8, 0).tolist()


def test_the_boxes_of_an_image_are_close_in_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "SHUFFLE_IMAGES", 8)
    count, per_image = 200, 5
    boxes = TrainingBoxes(
        tuple(Path(f"{n}.png") for n in range(count)),
        np.full((count, 2), 100),
        np.arange(count * per_image) % count,
        np.zeros((count * per_image, 4)),
        count * per_image,
        LeftOut(),
    )
    order = epoch_order(boxes, 0, 0)
    assert sorted(order) == list(range(len(boxes)))
    images = boxes.image_of_box[order]
    spans = [np.ptp(np.flatnonzero(images == image)) for image in range(count)]
    assert max(spans) < 8 * per_image


def test_large_images_form_smaller_shuffle_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "SHUFFLE_BYTES", 3 * 1000 * 1000 * 2)
    boxes = TrainingBoxes(
        tuple(Path(f"{n}.png") for n in range(20)),
        np.full((20, 2), 1000),
        np.repeat(np.arange(20), 2),
        np.zeros((40, 4)),
        40,
        LeftOut(),
    )
    images = boxes.image_of_box[epoch_order(boxes, 0, 0)]
    assert max(np.ptp(np.flatnonzero(images == image)) for image in range(20)) < 4

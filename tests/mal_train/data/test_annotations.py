import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mal_train.core.coco.annotations import parse_coco
from mal_train.core.errors import BadDataset
from mal_train.core.settings import Compat
from mal_train.data import annotations
from mal_train.data.annotations import TrainingBoxes, epoch_order, read_training_boxes, select_boxes
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
    assert dict(boxes.excluded) == {
        "CROWD": 1,
        "BOX_TOO_SMALL": 1,
        "BAD_BOX": 1,
        "IMAGE_UNKNOWN": 1,
        "IMAGE_UNUSABLE": 2,
    }
    summary = boxes.summary()
    assert "2 of 8 boxes" in summary
    assert "2 IMAGE_UNUSABLE" in summary


def test_a_file_without_usable_boxes_is_rejected_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"8 BOX_TOO_SMALL.*min_obj_size"):
        read(*write_scenes(tmp_path), min_area=1e6)


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
        Counter(),
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
        Counter(),
    )
    images = boxes.image_of_box[epoch_order(boxes, 0, 0)]
    assert max(np.ptp(np.flatnonzero(images == image)) for image in range(20)) < 4

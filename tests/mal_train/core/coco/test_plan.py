"""The compact plan of a job on a dataset: its rows image by image, whole or pending."""

import json
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.coco.annotations import Annotation, CocoFile, by_image, read_coco
from mal_train.core.coco.detections import read_detections
from mal_train.core.coco.plan import DatasetPlan, PendingRows, RowAction, read_detection_plan, read_plan
from mal_train.core.errors import BadDataset
from mal_train.core.settings import RotatedBoxes, RowRules
from tests.mal_train.core.coco import coco_rows
from tests.mal_train.core.coco.coco_rows import dataset


def row(number: int, image: Any, **more: Any) -> dict[str, Any]:
    return coco_rows.row(number, image_id=image, **{"bbox": [number, 2.5, 10, 20], **more})


ROWS = [
    row(1, "b"),
    row(2, 1),
    row(3, "b", iscrowd=1),
    row(4, 1),
    row(5, "b"),
    row(6, 9),
    row(7, 1, bbox="none"),
    row(8, 1),
]
IMAGES = [
    {"id": 1, "file_name": "1.png", "width": 40, "height": 30},
    {"id": 2, "file_name": "2.png"},
    {"id": "b", "file_name": "b.png"},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "in.json"
    path.write_text(json.dumps(dataset(*ROWS, images=IMAGES)))
    return path


def boxes(pending: PendingRows) -> list[tuple[Any, list[float]]]:
    return [(image.id, [each.box_xywh[0] for each in rows]) for image, rows in pending.annotations()]


def boxes_to_label(coco: CocoFile) -> list[tuple[Any, list[Any]]]:
    """Returns what `boxes` returns when nothing is labeled."""
    by_id = [(image.id, [a for a in rows if a.problem is None and not a.iscrowd]) for image, rows in by_image(coco)]
    return [(image_id, [a.box_xywh[0] for a in rows]) for image_id, rows in by_id if rows]


def test_rows_are_labeled_copied_or_reported(path: Path) -> None:
    plan = read_plan(path)
    assert list(plan.actions) == [
        *(RowAction.LABEL, RowAction.LABEL, RowAction.COPY_CROWD, RowAction.LABEL),
        *(RowAction.LABEL, RowAction.REPORT, RowAction.REPORT, RowAction.LABEL),
    ]


def test_pending_images_have_the_boxes_of_the_file_image_by_image(path: Path) -> None:
    pending = read_plan(path).pending(lambda _: False)
    assert boxes(pending) == boxes_to_label(read_coco(path)) == [(1, [2, 4, 8]), ("b", [1, 5])]
    assert pending.indices.tolist() == [1, 3, 7, 0, 4]
    assert list(pending.by_image()) == [(0, [1, 3, 7]), (2, [0, 4])]
    ((image, rows), _) = pending.annotations()
    assert image == read_coco(path).images[1]
    assert rows[0] == Annotation(None, 1, None, (2, 2.5, 10, 20), iscrowd=False, raw={})


def test_labeled_rows_are_not_pending_unless_their_image_must_be_complete(path: Path) -> None:
    plan, labeled = read_plan(path), {1, 0, 4}
    assert boxes(plan.pending(labeled.__contains__)) == [(1, [4, 8])]
    assert boxes(plan.pending(labeled.__contains__, complete_images=True)) == [(1, [2, 4, 8])]
    assert boxes(plan.pending(labeled.__contains__, lambda image: image == 2)) == []
    assert boxes(plan.pending(lambda _: True, complete_images=True)) == []


def test_a_slice_of_the_pending_images_is_a_view(path: Path) -> None:
    images = read_plan(path).pending(lambda _: False).annotations()
    assert len(images) == 2
    assert list(images[1::2]) == [images[1]] == [images[-1]]
    assert list(images[::2]) == [images[0]]
    assert len(images[2:]) == 0
    with pytest.raises(IndexError):
        images[2]


def test_a_file_without_annotations_has_no_pending_image(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text(json.dumps(dataset(images=IMAGES)))
    pending = read_plan(path).pending(lambda _: False, complete_images=True)
    assert (list(pending.by_image()), len(pending.annotations())) == ([], 0)


def detection_plan(path: Path, rows: Any) -> tuple[DatasetPlan, Path]:
    results = path.with_name("results.json")
    results.write_text(json.dumps(rows))
    return read_detection_plan(path, results), results


def test_detections_take_the_place_of_the_annotations(path: Path) -> None:
    rows: list[Any] = [{key: each[key] for key in each if key != "id"} | {"score": 0.5} for each in ROWS]
    rows[1].pop("score")
    rows.insert(0, 7)
    plan, results = detection_plan(path, rows)
    expected = read_detections(results, read_coco(path))
    assert plan.detections is not None
    assert [each for each, _ in plan.detections] == expected.raw["annotations"]
    assert [annotation for _, annotation in plan.detections] == expected.annotations
    assert boxes(plan.pending(lambda _: False)) == boxes_to_label(expected)
    assert (plan.head.count, len(plan.actions)) == (9, 9)


def test_detections_are_read_by_the_rules_of_the_job(path: Path) -> None:
    rows = [row(1, 1, score=1, attributes={"rotation": 30}), row(2, 1, score=1, iscrowd=1)]
    results = path.with_name("results.json")
    results.write_text(json.dumps(rows))
    assert list(read_detection_plan(path, results).actions) == [RowAction.REPORT, RowAction.COPY_CROWD]
    rules = RowRules(crowd_as_objects=True, rotated_boxes=RotatedBoxes.UPRIGHT)
    assert list(read_detection_plan(path, results, rules).actions) == [RowAction.LABEL, RowAction.LABEL]


def test_detections_that_changed_after_the_plan_are_noticed(path: Path) -> None:
    plan, results = detection_plan(path, [row(1, 1, score=1)])
    results.write_text(json.dumps([row(1, 1, score=2)]))
    assert plan.detections is not None
    with pytest.raises(BadDataset, match=r"results\.json"):
        list(plan.detections)


@pytest.mark.parametrize("content", ["", "[", "[1 2]", "[1]]", '{"annotations": []}', "5"])
def test_a_results_list_that_cannot_be_read_is_rejected_by_name(path: Path, content: str) -> None:
    results = path.with_name("results.json")
    results.write_text(content)
    with pytest.raises(BadDataset, match=r"results\.json"):
        read_detection_plan(path, results)


def test_the_annotation_file_of_detections_is_checked_as_always(path: Path) -> None:
    results = path.with_name("results.json")
    results.write_text("[]")
    path.write_text(json.dumps(dataset(row(1, 1), row(1, 1), images=IMAGES)))
    with pytest.raises(BadDataset, match=r"in\.json"):
        read_detection_plan(path, results)

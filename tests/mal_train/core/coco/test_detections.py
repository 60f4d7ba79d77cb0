"""Results lists of a detector as input."""

import json
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.coco.annotations import CocoFile, JsonId, Reason, parse_coco
from mal_train.core.coco.detections import read_detections
from mal_train.core.coco.output import error_fields, label_fields, labeled_file
from mal_train.core.errors import BadDataset
from tests.mal_train.core.coco.coco_rows import dataset

COCO = parse_coco(dataset({"id": 7, "image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9]}, info={"by": "me"}))


def detection(**fields: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 20], "score": 0.5, **fields}


def read(folder: Path, rows: Any) -> CocoFile:
    path = folder / "detections.json"
    path.write_text(json.dumps(rows))
    return read_detections(path, COCO)


def test_rows_replace_the_annotations(tmp_path: Path) -> None:
    found = read(tmp_path, [detection(note="mine")])
    (row,) = found.annotations
    assert (row.box_xywh, row.problem, row.raw["note"]) == ((1, 2, 10, 20), None, "mine")
    assert found.images == COCO.images
    assert found.raw["info"] == {"by": "me"}


def test_new_ids_follow_list_order_and_skip_existing_ids(tmp_path: Path) -> None:
    rows = [detection(), detection(id=2), detection(), detection(id="a"), detection()]
    for _ in range(2):
        assert [row.id for row in read(tmp_path, rows).annotations] == [1, 2, 3, "a", 4]


def test_a_repeated_id_rejects_the_list(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"detections\.json: id 5 "):
        read(tmp_path, [detection(id=5), detection(id=5)])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (detection(score=None), Reason.BAD_SCORE),
        (detection(score="0.5"), Reason.BAD_SCORE),
        (detection(score=float("nan")), Reason.BAD_SCORE),
        (detection(score=True), Reason.BAD_SCORE),
        ({k: v for k, v in detection().items() if k != "score"}, Reason.BAD_SCORE),
        (detection(image_id=9), Reason.IMAGE_UNKNOWN),
        (detection(bbox=[1, 2, 3]), Reason.BAD_BOX),
        (detection(id=None), Reason.BAD_ID),
        (7, Reason.NOT_AN_OBJECT),
    ],
)
def test_an_invalid_row_keeps_its_index_and_reason(tmp_path: Path, row: Any, reason: Reason) -> None:
    found = read(tmp_path, [row, detection()])
    assert [annotation.reason for annotation in found.annotations] == [reason, None]


@pytest.mark.parametrize(("content", "named"), [({"a": 1}, "an object"), (3, "a number")])
def test_a_file_that_is_not_a_list_is_rejected(tmp_path: Path, content: Any, named: str) -> None:
    with pytest.raises(BadDataset, match=named):
        read(tmp_path, content)


def test_the_output_contains_both_scores(tmp_path: Path) -> None:
    found = read(tmp_path, [detection(score=0.25), detection(score=0.75), detection(score="x"), None])
    results: dict[JsonId, dict[str, Any]] = {1: label_fields({}, 5, 0.9), 2: error_fields("IMAGE_NOT_FOUND", "gone")}
    rows = labeled_file(found, results)["annotations"]
    assert [(row["score"], row["mask_score"]) for row in rows[:3]] == [
        (0.25, 0.9),
        (0.75, 0.0),
        ("x", 0.0),
    ]
    assert rows[3] is None
    assert "error" not in rows[0]

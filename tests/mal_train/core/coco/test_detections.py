"""A detector's results list as boxes."""

import json
from pathlib import Path
from typing import Any

import pytest

from mal_train.core.coco.annotations import CocoFile, JsonId, Reason, parse_coco
from mal_train.core.coco.detections import read_detections, with_detector_scores
from mal_train.core.coco.output import answer_fields, error_fields, labeled_file
from mal_train.core.errors import BadDataset
from tests.mal_train.core.coco.coco_rows import dataset

COCO = parse_coco(dataset({"id": 7, "image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9]}, info={"by": "me"}))


def detection(**fields: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 20], "score": 0.5, **fields}


def read(folder: Path, rows: Any) -> CocoFile:
    path = folder / "detections.json"
    path.write_text(json.dumps(rows))
    return read_detections(path, COCO)


def test_rows_take_the_place_of_the_annotations(tmp_path: Path) -> None:
    found = read(tmp_path, [detection(note="mine")])
    (row,) = found.annotations
    assert (row.box_xywh, row.problem, row.raw["note"]) == ((1, 2, 10, 20), None, "mine")
    assert found.images == COCO.images
    assert found.raw["info"] == {"by": "me"}


def test_ids_follow_the_order_of_the_list_and_spare_given_ones(tmp_path: Path) -> None:
    rows = [detection(), detection(id=2), detection(), detection(id="a"), detection()]
    for _ in range(2):
        assert [row.id for row in read(tmp_path, rows).annotations] == [1, 2, 3, "a", 4]


def test_an_id_that_stands_twice_refuses_the_list(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match="id 5 used more than once"):
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
        (detection(category_id=9), Reason.CATEGORY_UNKNOWN),
        (detection(bbox=[1, 2, 3]), Reason.BAD_BOX),
        (detection(id=None), Reason.BAD_ID),
        (7, Reason.NOT_AN_OBJECT),
    ],
)
def test_a_faulty_row_keeps_its_place_and_says_why(tmp_path: Path, row: Any, reason: Reason) -> None:
    found = read(tmp_path, [row, detection()])
    assert [annotation.reason for annotation in found.annotations] == [reason, None]


@pytest.mark.parametrize(("content", "part"), [({"a": 1}, "give its path as ann_path"), (3, "results list is needed")])
def test_what_is_no_list_is_refused(tmp_path: Path, content: Any, part: str) -> None:
    with pytest.raises(BadDataset, match=part):
        read(tmp_path, content)


def test_both_scores_stand_in_the_output(tmp_path: Path) -> None:
    found = read(tmp_path, [detection(score=0.25), detection(score=0.75), detection(score="x"), None])
    answers: dict[JsonId, dict[str, Any]] = {1: answer_fields({}, 5, 0.9), 2: error_fields("IMAGE_NOT_FOUND", "gone")}
    out = with_detector_scores(labeled_file(found, answers), found)
    assert [(row["score"], row["mask_score"]) for row in out["annotations"][:3]] == [
        (0.25, 0.9),
        (0.75, 0.0),
        ("x", 0.0),
    ]
    assert out["annotations"][3] is None
    assert "error" not in out["annotations"][0]

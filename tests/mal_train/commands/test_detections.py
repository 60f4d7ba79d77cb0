"""`mal-train inference` and `evaluate` with detected boxes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from mal_train.cli import main
from mal_train.core.metrics.average_precision import AP_NAMES
from tests.mal_train.core.metrics.ground_truths import run_pycocotools
from tests.mal_train.test_cli import checkpoint, inference_spec, labels_of, spec_file
from tests.scenes import write_scenes

__all__ = ["checkpoint"]


def write_detections(folder: Path, annotations: Path) -> Path:
    """Writes detections: shifted copies of the boxes, one of them twice, with scores and without ids."""
    rng = np.random.default_rng(0)
    rows = json.loads(annotations.read_text())["annotations"]
    detections = [
        {
            "image_id": row["image_id"],
            "category_id": row["category_id"],
            "bbox": [float(v + d) for v, d in zip(row["bbox"], rng.integers(-2, 3, 4), strict=True)],
            "score": round(float(rng.random()), 3),
        }
        for row in [*rows, rows[0]]
    ]
    path = folder / "detections.json"
    path.write_text(json.dumps(detections))
    return path


def test_detections_get_masks_and_keep_their_scores(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=3)
    detections = write_detections(tmp_path, scenes[0])
    spec = inference_spec(tmp_path, checkpoint, scenes, box_inputs=str(detections))
    assert main(["inference", "-e", spec]) == 0
    given = json.loads(detections.read_text())
    rows = labels_of(tmp_path)
    assert list(rows) == [1, 2, 3, 4, 5, 6, 7]
    for row, detection in zip(rows.values(), given, strict=True):
        assert {key: row[key] for key in detection} == detection
        assert (row["mask_score"] > 0) == (row["area"] > 0)
    assert any(row["mask_score"] > 0 for row in rows.values())
    # COCO's own loader takes the rows as results.
    COCO(str(scenes[0])).loadRes(list(rows.values()))


def test_a_detection_without_a_mask_counts_for_the_boxes_only(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=3)
    detections = write_detections(tmp_path, scenes[0])
    removed = json.loads(scenes[0].read_text())["images"][0]["file_name"]
    spec = spec_file(
        tmp_path,
        dataset={"val_ann_path": str(scenes[0]), "val_img_dir": str(scenes[1])},
        evaluate={"checkpoint": str(checkpoint), "precision": "float32", "box_inputs": str(detections)},
    )
    results = []
    for exists in (True, False):
        if not exists:
            (scenes[1] / removed).unlink()
        assert main(["evaluate", "-e", spec]) == (0 if exists else 3)
        results.append(json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text()))
    complete, partial = results
    assert all(partial[f"{name}_bbox"] == complete[f"{name}_bbox"] for name in AP_NAMES)
    assert partial["detections"] < complete["detections"]
    assert partial["skipped_by_reason"] == {"IMAGE_NOT_FOUND": complete["detections"] - partial["detections"]}


def test_metrics_of_boxes_and_masks_equal_those_of_pycocotools(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=3)
    detections = write_detections(tmp_path, scenes[0])
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, scenes, box_inputs=str(detections))]) == 0
    made = list(labels_of(tmp_path).values())
    spec = spec_file(
        tmp_path,
        dataset={"val_ann_path": str(scenes[0]), "val_img_dir": str(scenes[1])},
        evaluate={"checkpoint": str(checkpoint), "precision": "float32", "box_inputs": str(detections)},
    )
    assert main(["evaluate", "-e", spec]) == 0
    results = json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text())
    truth = json.loads(scenes[0].read_text())
    for number, row in enumerate(truth["annotations"], start=1):
        row["id"] = number  # pycocotools treats an annotation with id 0 as unmatched
        row["area"] = float(mask_area(row["segmentation"]))
    for kind in ("bbox", "segm"):
        rows = [{key: row[key] for key in ("image_id", "category_id", "score", *FORM[kind])} for row in made]
        expected: dict[str, Any] = {
            name: None if value < 0 else value
            for name, value in zip(AP_NAMES, run_pycocotools(truth, rows, kind), strict=True)
        }
        assert {name: results[f"{name}_{kind}"] for name in AP_NAMES} == expected
    assert 0 < results["AP_bbox"] < 1
    assert results["detections"] == 7
    assert capsys.readouterr().out.startswith("7 detections")


FORM = {"bbox": ("bbox",), "segm": ("segmentation",)}


def mask_area(code: dict[str, Any]) -> int:
    from mal_train.core.masks import rle

    return rle.area(rle.Rle.from_coco(code))


def test_detections_without_a_mask_are_counted_by_reason_and_named_with_their_file(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=3)
    detections = write_detections(tmp_path, scenes[0])
    rows = json.loads(detections.read_text())
    rows[0]["image_id"], rows[1]["score"], rows[2]["bbox"] = 99, None, [500, 500, 9, 9]
    detections.write_text(json.dumps(rows))
    (scenes[1] / "2.png").unlink()
    spec = spec_file(
        tmp_path,
        dataset={"val_ann_path": str(scenes[0]), "val_img_dir": str(scenes[1])},
        evaluate={"checkpoint": str(checkpoint), "precision": "float32", "box_inputs": str(detections)},
    )
    assert main(["evaluate", "-e", spec]) == 3
    results = json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text())
    assert results["skipped_by_reason"] == {"IMAGE_NOT_FOUND": 2, "BAD_SCORE": 1, "BAD_BOX": 1, "IMAGE_UNKNOWN": 1}
    assert results["detections"] == 2
    err = capsys.readouterr().err
    assert f"{detections}: not measured: 2 IMAGE_NOT_FOUND" in err
    assert f"{scenes[0]}: not measured" not in err, "its rows have no fault"


def test_ground_truth_without_a_category_is_one_category(tmp_path: Path, checkpoint: Path) -> None:
    def drop(content: dict[str, Any]) -> None:
        for row in content["annotations"][::2]:
            row["category_id"] = None

    scenes = write_scenes(tmp_path / "scenes", images=3, change=drop)
    detections = write_detections(tmp_path, scenes[0])
    spec = spec_file(
        tmp_path,
        dataset={"val_ann_path": str(scenes[0]), "val_img_dir": str(scenes[1])},
        evaluate={"checkpoint": str(checkpoint), "precision": "float32", "box_inputs": str(detections)},
    )
    assert main(["evaluate", "-e", spec]) == 0
    results = json.loads((tmp_path / "results" / "evaluate" / "results.json").read_text())
    assert 0 < results["AP_bbox"] < 1

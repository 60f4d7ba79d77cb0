"""The output of `mal-train inference`: the bytes of one that is made in memory, and printed failures."""

import json
from pathlib import Path
from typing import Any

import pytest

from mal_train.cli import main
from mal_train.commands import inference_output
from mal_train.core.coco.annotations import CocoFile, by_image, read_coco
from mal_train.core.coco.detections import read_detections
from mal_train.core.coco.output import error_fields, label_fields, labeled_file, write_json_atomic
from mal_train.core.errors import BadDataset, ConfigError
from mal_train.core.masks import rle
from mal_train.kernel.labeler.load import load_labeler
from mal_train.offline.dataset_labeler import LabelFailure
from mal_train.offline.tta import TtaOptions, label_images
from mal_train.training.validation import has_masks
from tests.mal_train.test_cli import checkpoint, inference_spec, labels_of, spec_file
from tests.scenes import write_scenes

__all__ = ["checkpoint"]


def break_rows(coco: dict[str, Any]) -> None:
    rows = coco["annotations"]
    rows[0].update(error={"reason": "OLD"}, flags=["OLD"], agreement=0.5, iou="old", note={"of": ["user", 1.5]})
    rows[1]["iscrowd"] = 1
    rows[2]["bbox"] = [500, 500, 10, 10]
    rows[3]["segmentation"] = [[10.5, 10, 60, 12, 30, 70]]
    rows[4]["segmentation"] = "unreadable"
    rows[5]["id"] = None
    rows[6]["category_id"] = 77
    coco["images"][4]["file_name"] = "gone.png"
    coco["images"] += [{"id": "no name"}, "junk"]
    rows.append({**rows[7], "id": "no name", "image_id": "no name", "iscrowd": 1})
    rows.append({**rows[7], "id": "unknown", "image_id": 999})
    rows.insert(0, {**rows[7], "id": 2.5})
    rows.append(7)
    coco["info"] = {"by": "é"}
    coco["mask_auto_labeler"] = {"old": 1}


def made_in_memory(
    coco: CocoFile, images: Path, checkpoint: Path, provenance: Any, *, with_iou: bool
) -> dict[str, Any]:
    labeler, _ = load_labeler(checkpoint, precision="float32")
    fields: dict[Any, dict[str, Any]] = {}
    for annotation, label in label_images(labeler, list(by_image(coco)), images, TtaOptions(), batch_size=4, threads=1):
        if isinstance(label, LabelFailure):
            fields[annotation.id] = error_fields(label.reason, label.message)
            continue
        fields[annotation.id] = label_fields(label.rle.to_coco(), label.area, label.score, label.flags)
        if with_iou and annotation.raw.get("segmentation"):
            try:
                truth = rle.from_segmentation(annotation.raw["segmentation"], label.rle.height, label.rle.width)
            except BadDataset:
                continue
            fields[annotation.id]["iou"] = rle.iou(truth, label.rle)
    fields.pop(None, None)
    labeled = labeled_file(coco, fields, provenance)
    for row in labeled["annotations"]:
        if isinstance(row, dict) and "mask_score" in row and "iou" in fields.get(row["id"], {}):
            row["iou"] = row.pop("iou")  # the last field
    return labeled


@pytest.mark.parametrize("of_detections", [False, True])
@pytest.mark.parametrize("load_mask", [False, True])
def test_the_output_has_the_bytes_of_one_that_is_made_in_memory(
    tmp_path: Path, checkpoint: Path, of_detections: bool, load_mask: bool
) -> None:
    annotations, images = write_scenes(tmp_path / "scenes", images=6, change=break_rows)
    coco, more = read_coco(annotations), {}
    if of_detections:
        path = tmp_path / "detections.json"
        rows = coco.raw["annotations"]
        for number, row in enumerate(rows[:-1]):
            row["score"] = number / 100
        rows[3].pop("score")
        path.write_text(json.dumps(rows))
        coco, more = read_detections(path, coco), {"box_inputs": str(path)}
    spec = inference_spec(tmp_path, checkpoint, (annotations, images), load_mask=load_mask, **more)
    assert main(["inference", "-e", spec]) == 3
    output = tmp_path / "results" / "inference" / "instances_val2017_mal.json"
    provenance = json.loads(output.read_text())["mask_auto_labeler"]
    expected = made_in_memory(coco, images, checkpoint, provenance, with_iou=load_mask)
    write_json_atomic(tmp_path / "expected.json", expected)
    assert output.read_bytes() == (tmp_path / "expected.json").read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == [
        *(".lock", "experiment.yaml", output.name, "status.json"),
    ]


@pytest.mark.parametrize("tta", [{}, {"margins": [0.2, 0.6], "refine_edges": True}, {"resolve_overlaps": True}])
def test_masks_obey_the_points_of_their_rows(tmp_path: Path, checkpoint: Path, tta: dict[str, Any]) -> None:
    def click(coco: dict[str, Any]) -> None:
        rows = coco["annotations"]
        x, y, w, h = rows[0]["bbox"]
        rows[0]["points"] = [[x + 0.5, y + 0.5, 1], [x + w / 2, y + h / 2, 0]]
        rows[1]["points"] = [[95, 79, 1]]
        rows[2]["points"] = "no list"
        rows[3]["points"] = [[x, y, 0]] * 65

    annotations, images = write_scenes(tmp_path / "scenes", images=2, change=click)
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, (annotations, images), **tta)]) == 3
    found = labels_of(tmp_path)
    mask = rle.decode_mask(rle.Rle.from_coco(found[0]["segmentation"]))
    assert [bool(mask[int(y), int(x)]) for x, y, _ in found[0]["points"]] == [True, False]
    assert [key for key, row in found.items() if "corrected" in row] == [0]
    assert {key: row["error"]["reason"] for key, row in found.items() if "error" in row} == dict.fromkeys(
        (1, 10, 11), "BAD_POINT"
    )


def test_evaluation_measures_the_masks_of_boxes_whatever_their_points_are(tmp_path: Path) -> None:
    def click(coco: dict[str, Any]) -> None:
        for row in coco["annotations"]:
            row["points"] = [[1, 1, 0]] if row["id"] % 2 else "of another meaning"

    annotations, images = write_scenes(tmp_path, images=2, change=click)
    coco = read_coco(annotations)
    assert has_masks(coco)
    assert not coco.problem_counts()
    assert not any(row.points for row in coco.annotations)
    read = [row for _, rows in by_image(coco) for row in rows]
    assert all(row is other for row, other in zip(read, coco.annotations, strict=True))
    paths = (f"dataset.val_ann_path={annotations}", f"dataset.val_img_dir={images}", f"results_dir={tmp_path}")
    assert main(["evaluate", "evaluate.checkpoint=builtin", *paths]) == 0
    results = json.loads((tmp_path / "evaluate" / "results.json").read_text())
    assert results["count"] == len(coco.annotations)


def test_the_detections_are_not_replaced_by_the_output(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=1)
    path = tmp_path / "detections.json"
    path.write_text("[]")
    spec = inference_spec(tmp_path, checkpoint, scenes, box_inputs=str(path), label_dump_path=str(path))
    assert main(["inference", "-e", spec]) == ConfigError.exit_code
    assert path.read_text() == "[]"


def test_a_file_of_failures_prints_a_bounded_number_of_lines(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inference_output, "MAX_MESSAGES", 3)

    def move_boxes(coco: dict[str, Any]) -> None:
        for row in coco["annotations"]:
            row["bbox"] = [500, 500, 10, 10]

    scenes = write_scenes(tmp_path / "scenes", images=5, change=move_boxes)
    assert main(["inference", "-e", inference_spec(tmp_path, checkpoint, scenes)]) == 3
    printed = capsys.readouterr()
    assert sum(line.startswith("no mask") for line in printed.err.splitlines()) == 4
    assert "7 boxes" in printed.err
    assert "10 boxes without a mask: BAD_BOX" in printed.out


def test_a_spec_without_a_checkpoint_leaves_no_journal(tmp_path: Path, checkpoint: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", images=1)
    spec = spec_file(tmp_path, inference={"ann_path": str(scenes[0]), "img_dir": str(scenes[1])})
    assert main(["inference", "-e", spec]) == ConfigError.exit_code
    assert not list((tmp_path / "results").rglob("*.ledger"))

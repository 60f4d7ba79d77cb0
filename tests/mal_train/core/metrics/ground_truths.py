"""Builders of ground truth, and the real subset, for tests of metrics."""

import contextlib
import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mal_train.core.coco.annotations import Annotation, CocoFile, read_coco
from mal_train.core.masks import rle
from mal_train.core.masks.rle import Rle
from tests.reference import shared

Mask = NDArray[np.bool_]


def square(row: int, col: int, side: int, frame: tuple[int, int] = (40, 60)) -> Rle:
    return rle.encode_region(np.ones((side, side), dtype=np.bool_), row, col, frame)


def truth_of(
    annotation_id: Any, mask: Rle | None, image_id: Any = 1, category_id: Any = 1, **fields: Any
) -> Annotation:
    raw = {**fields} if mask is None else {"segmentation": mask.to_coco(), **fields}
    return Annotation(annotation_id, image_id, category_id, (0.0, 0.0, 8.0, 8.0), bool(fields.get("iscrowd")), raw)


def val_dev() -> CocoFile:
    return read_coco(shared("data", "coco_val_dev", "annotations.json"))


def frame_of(coco: CocoFile, annotation: Annotation) -> tuple[int, int]:
    assert annotation.image_id is not None
    size = coco.images[annotation.image_id].size_wh
    assert size is not None
    return size[1], size[0]


def run_pycocotools(truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str = "segm") -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(truth))
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]

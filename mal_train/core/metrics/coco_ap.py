"""COCO's twelve metrics of masks or boxes: the numbers that pycocotools computes, in a fraction of its time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from mal_train.core.coco.annotations import JsonId, id_order
from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.masks.rle import Rle
from mal_train.core.metrics.average_precision import AP_NAMES, Floats, Group, coco_summary
from mal_train.core.metrics.miou import CocoMetrics

Scores = Literal["one", "score"]
IouType = Literal["segm", "bbox"]
"""Overlap of masks or of boxes; pycocotools' iouType."""


@dataclass(frozen=True, eq=False)
class ApInput:
    """Detections and ground truth with their overlaps; gives the metrics for any scores."""

    groups: Sequence[Group]
    scores: Sequence[Floats]

    def metrics(self, scores: Scores = "score") -> CocoMetrics:
        """Computes the metrics of AP_NAMES; None where no instance defines one.

        Args:
            scores: "one" sets every score to 1; ties are then decided by the order of images and rows.
        """
        used = self.scores if scores == "score" else [np.ones_like(score) for score in self.scores]
        values = coco_summary(self.groups, used)
        return {name: None if value < 0 else value for name, value in zip(AP_NAMES, values, strict=True)}


def coco_ap(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    scores: Scores = "score",
    iou_type: IouType = "segm",
) -> CocoMetrics:
    """Computes COCO's twelve metrics by the names of AP_NAMES; see `ap_input` and `ApInput.metrics`."""
    return ap_input(truth, results, iou_type).metrics(scores)


def ap_input(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], iou_type: IouType = "segm") -> ApInput:
    """Computes the overlaps of results with the ground truth of their category and image.

    Ids may be of any JSON type; images and categories are ordered by id, rows as in the file. Size classes follow the
    `area` of the ground truth where it is given, else the area of its mask (segm) or box (bbox).

    Args:
        truth: a COCO object; images need width and height only where masks are polygons; iscrowd is honored.
        results: COCO results: image_id, category_id, score and segmentation (run lengths or polygons) or bbox. A
            segmentation may also be an `Rle`.
        iou_type: compare masks (segm) or boxes (bbox).

    Raises:
        BadDataset: a malformed mask, or a result for an image that is not in the ground truth.
    """
    images = {image["id"]: image for image in truth["images"]}
    # A category without ground truth has no AP, so its detections are ignored.
    known = {row["category_id"] for row in truth["annotations"]}
    pairs: dict[tuple[JsonId, JsonId], tuple[list[_Shape], list[_Shape]]] = {}
    for row_type, rows, side in (("annotation", truth["annotations"], 1), ("result", results, 0)):
        for number, row in enumerate(rows, start=1):
            if row["category_id"] not in known:
                continue
            name = f"{row_type} {number}"
            if row["image_id"] not in images:
                raise BadDataset(f"{name}: image_id {row['image_id']!r} is not among the images of the ground truth")
            shape = _shape(row, images[row["image_id"]], name, iou_type, is_truth=bool(side))
            pairs.setdefault((row["category_id"], row["image_id"]), ([], []))[side].append(shape)
    numbers = {category: n for n, category in enumerate(sorted(known, key=id_order))}
    keys = sorted(pairs, key=lambda key: (numbers[key[0]], id_order(key[1])))
    groups = [_group(numbers[key[0]], *pairs[key]) for key in keys]
    return ApInput(groups, [np.array([shape.score for shape in pairs[key][0]], dtype=np.float64) for key in keys])


@dataclass(frozen=True, slots=True)
class _Shape:
    """A mask or a box in the form of pycocotools' `iou`, with the other values that decide its matches."""

    coco_form: Any
    area: float
    score: float
    is_crowd: bool


def _shape(row: Mapping[str, Any], image: Mapping[str, Any], name: str, iou_type: IouType, *, is_truth: bool) -> _Shape:
    coco_form: Any
    if iou_type == "segm":
        code = _code(row.get("segmentation"), image, name)
        coco_form, area = code.to_coco(), float(rle.area(code))
    else:
        coco_form = [float(value) for value in row["bbox"]]
        area = coco_form[2] * coco_form[3]
    if is_truth:
        return _Shape(coco_form, float(row.get("area", area)), 0.0, bool(row.get("iscrowd", 0)))
    return _Shape(coco_form, area, float(row.get("score", 1.0)), False)


def _group(category: int, detections: Sequence[_Shape], truths: Sequence[_Shape]) -> Group:
    crowd = [truth.is_crowd for truth in truths]
    iou = np.zeros((len(detections), len(truths)))
    if detections and truths:
        iou[:] = coco_mask.iou([d.coco_form for d in detections], [t.coco_form for t in truths], list(map(int, crowd)))
    return Group(
        category,
        np.array([detection.area for detection in detections], dtype=np.float64),
        np.array([truth.area for truth in truths], dtype=np.float64),
        np.array(crowd, dtype=np.bool_),
        iou,
    )


def _code(segmentation: Any, image: Mapping[str, Any], name: str) -> Rle:
    if isinstance(segmentation, Rle):
        return segmentation
    if isinstance(segmentation, dict):
        return Rle.from_coco(segmentation, name)
    if "height" not in image or "width" not in image:
        raise BadDataset(f"{name}: polygons need the width and height of image {image['id']!r}")
    return rle.from_segmentation(segmentation, image["height"], image["width"], name)

"""COCO's twelve figures, of masks or of boxes: the numbers that pycocotools computes, in a fraction of its time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from mal_train.core.coco.annotations import JsonId, id_order
from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.masks.rle import Rle
from mal_train.core.metrics.average_precision import Floats, Group, coco_summary
from mal_train.core.metrics.miou import Figures

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl")
"""COCO's twelve figures in pycocotools' order, under the names of the published code (§6.2)."""

Scores = Literal["one", "score"]
Kind = Literal["segm", "bbox"]


@dataclass(frozen=True, eq=False)
class ApInput:
    """Detections and ground truth with their overlaps, from which figures come for any scores."""

    groups: Sequence[Group]
    scores: Sequence[Floats]

    def figures(self, scores: Scores = "score") -> Figures:
        """The twelve by the names of AP_NAMES; None where no instance speaks for one.

        Args:
            scores: "one" sets every score to 1, so that the order of images and rows decides ties.
        """
        used = self.scores if scores == "score" else [np.ones_like(score) for score in self.scores]
        values = coco_summary(self.groups, used)
        return {name: None if value < 0 else value for name, value in zip(AP_NAMES, values, strict=True)}


def coco_ap(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], scores: Scores = "score", kind: Kind = "segm"
) -> Figures:
    """COCO's twelve figures, by the names of AP_NAMES; see `ap_input` and `ApInput.figures`."""
    return ap_input(truth, results, kind).figures(scores)


def ap_input(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Kind = "segm") -> ApInput:
    """Overlaps of results with the ground truth of their class and image.

    Ids may be of any JSON type; images and classes count in id order, rows in file order. Size classes follow the
    `area` of the ground truth as it stands, else its mask (segm) or box (bbox).

    Args:
        truth: a COCO object; images need width and height only where masks are polygons; iscrowd is honored.
        results: COCO results: image_id, category_id, score and segmentation (run lengths or polygons) or bbox. A
            segmentation may also be an `Rle` that was read before.
        kind: whether masks or boxes are compared.

    Raises:
        BadDataset: a mask that is malformed, or a result for an image that the ground truth lacks.
    """
    images = {image["id"]: image for image in truth["images"]}
    # A class without ground truth has no AP, so its detections cannot matter.
    known = {row["category_id"] for row in truth["annotations"]}
    pairs: dict[tuple[JsonId, JsonId], tuple[list[_Shape], list[_Shape]]] = {}
    for what, rows, side in (("annotation", truth["annotations"], 1), ("result", results, 0)):
        for number, row in enumerate(rows, start=1):
            if row["category_id"] not in known:
                continue
            name = f"{what} {number}"
            if row["image_id"] not in images:
                raise BadDataset(f"{name}: image_id {row['image_id']!r} is not among the images of the ground truth")
            shape = _shape(row, images[row["image_id"]], name, kind, is_truth=bool(side))
            pairs.setdefault((row["category_id"], row["image_id"]), ([], []))[side].append(shape)
    numbers = {category: n for n, category in enumerate(sorted(known, key=id_order))}
    keys = sorted(pairs, key=lambda key: (numbers[key[0]], id_order(key[1])))
    groups = [_group(numbers[key[0]], *pairs[key]) for key in keys]
    return ApInput(groups, [np.array([shape.score for shape in pairs[key][0]], dtype=np.float64) for key in keys])


@dataclass(frozen=True, slots=True)
class _Shape:
    """A mask or a box as pycocotools' overlap takes it, with what else decides its matches."""

    form: Any
    area: float
    score: float
    is_crowd: bool


def _shape(row: Mapping[str, Any], image: Mapping[str, Any], name: str, kind: Kind, *, is_truth: bool) -> _Shape:
    form: Any
    if kind == "segm":
        code = _code(row.get("segmentation"), image, name)
        form, area = code.to_coco(), float(rle.area(code))
    else:
        form = [float(value) for value in row["bbox"]]
        area = form[2] * form[3]
    if is_truth:
        return _Shape(form, float(row.get("area", area)), 0.0, bool(row.get("iscrowd", 0)))
    return _Shape(form, area, float(row.get("score", 1.0)), False)


def _group(category: int, detections: Sequence[_Shape], truths: Sequence[_Shape]) -> Group:
    crowd = [truth.is_crowd for truth in truths]
    iou = np.zeros((len(detections), len(truths)))
    if detections and truths:
        iou[:] = coco_mask.iou([d.form for d in detections], [t.form for t in truths], list(map(int, crowd)))
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

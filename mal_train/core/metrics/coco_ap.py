"""COCO's twelve metrics of masks or boxes: the numbers that pycocotools computes, in a fraction of its time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from mal_train.core.coco.annotations import JsonId, id_order
from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.masks.rle import Rle
from mal_train.core.metrics.average_precision import AP_NAMES, LVIS_NAMES, MAX_DETS, Floats, Group, coco_summary
from mal_train.core.metrics.lvis import Federation, lvis_summary
from mal_train.core.metrics.miou import CocoMetrics
from mal_train.core.metrics.overlaps import IouType, Shape, crowd_overlaps, iou_matrix
from mal_train.core.numbers import finite_number

Scores = Literal["one", "score"]


@dataclass(frozen=True, eq=False)
class ApInput:
    """Detections and ground truth with their overlaps; gives the metrics for both kinds of scores.

    Detections that count for neither are left out.
    """

    groups: list[Group]
    scores: list[Floats]
    frequencies: list[str] = field(default_factory=list)
    """LVIS's frequency of each category, by its index in the groups."""

    def lvis_metrics(self, scores: Scores = "score") -> CocoMetrics:
        """Computes the metrics of LVIS_NAMES, for an input with a federation; see `metrics`."""
        return _known(LVIS_NAMES, lvis_summary(self.groups, self._scores(scores), self.frequencies))

    def metrics(self, scores: Scores = "score") -> CocoMetrics:
        """Computes the metrics of AP_NAMES; None where no instance defines one.

        Args:
            scores: "one" sets every score to 1; ties are then decided by the order of images and rows.
        """
        return _known(AP_NAMES, coco_summary(self.groups, self._scores(scores)))

    def _scores(self, scores: Scores) -> list[Floats]:
        return self.scores if scores == "score" else [np.ones_like(score) for score in self.scores]


def _known(names: Sequence[str], values: Sequence[float]) -> CocoMetrics:
    return {name: None if value < 0 else value for name, value in zip(names, values, strict=True)}


def coco_ap(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    scores: Scores = "score",
    iou_type: IouType = "segm",
) -> CocoMetrics:
    """Computes COCO's twelve metrics by the names of AP_NAMES; see `ap_input` and `ApInput.metrics`."""
    return ap_input(truth, results, iou_type).metrics(scores)


def ap_input(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    iou_type: IouType = "segm",
    *,
    federation: Federation | None = None,
) -> ApInput:
    """Computes the overlaps of results with the ground truth of their category and image.

    Ids may be of any JSON type; images and categories are ordered by id, rows as in the file. Size classes follow the
    `area` of the ground truth where it is given, else the area of its mask (segm) or box (bbox).

    Args:
        truth: a COCO object; images need width and height only where masks are polygons; iscrowd is honored.
        results: COCO results: image_id, category_id, score and segmentation (run lengths or polygons) or bbox. A
            segmentation may also be an `Rle`.
        iou_type: compare masks (segm) or boxes (bbox).
        federation: which categories are judged in which image; None: all in all, as in COCO. Results are then those
            that LVIS counts: in judged categories, and at most MAX_DETS_PER_IMAGE of an image.

    Raises:
        BadDataset: a malformed mask, or a result for an image that is not in the ground truth.
    """
    images = {image["id"]: image for image in truth["images"]}
    if federation is not None:
        results = federation.counted(truth["annotations"], results)
    # A category without ground truth has no AP, so its detections are ignored.
    known = {row["category_id"] for row in truth["annotations"]}
    pairs: dict[tuple[JsonId, JsonId], tuple[list[_Row], list[_Row]]] = {}
    for row_type, rows, side in (("annotation", truth["annotations"], 1), ("result", results, 0)):
        for number, row in enumerate(rows, start=1):
            if row["category_id"] not in known:
                continue
            name = f"{row_type} {number}"
            if row["image_id"] not in images:
                raise BadDataset(f"{name}: image_id {row['image_id']!r} is not among the images of the ground truth")
            one = _row(row, images[row["image_id"]], name, iou_type, is_truth=bool(side))
            pairs.setdefault((row["category_id"], row["image_id"]), ([], []))[side].append(one)
    # One sort for each category: a long one holds the interpreter, and images mostly come in order.
    images_of: dict[JsonId, list[JsonId]] = {category: [] for category in known}
    for category, image_id in pairs:
        images_of[category].append(image_id)
    numbers = {category: n for n, category in enumerate(sorted(known, key=id_order))}
    keys = ((category, image_id) for category in numbers for image_id in sorted(images_of[category], key=id_order))
    groups: list[Group] = []
    scores: list[Floats] = []
    for key in keys:
        detections, truths = pairs.pop(key)
        if not detections and all(one.is_crowd for one in truths):
            continue  # crowd regions alone decide nothing
        if federation is None:
            detections = _counted(detections)
        group = _group(numbers[key[0]], detections, truths)
        is_exhaustive = federation is None or key[0] not in federation.not_exhaustive.get(key[1], ())
        groups.append(group if is_exhaustive else replace(group, is_exhaustive=False))
        scores.append(np.array([one.score for one in detections], dtype=np.float64))
    frequencies = {} if federation is None else federation.frequencies
    return ApInput(groups, scores, [frequencies.get(category, "") for category in numbers])


class _Row(NamedTuple):
    """A mask or a box with the other values that decide its matches."""

    shape: Shape
    area: float
    score: float
    is_crowd: bool


def _row(row: Mapping[str, Any], image: Mapping[str, Any], name: str, iou_type: IouType, *, is_truth: bool) -> _Row:
    area = finite_number(row.get("area")) if is_truth else None
    if iou_type == "segm":
        code = _code(row.get("segmentation"), image, name)
        shape = Shape.of(code)
        area = float(rle.area(code)) if area is None else area
    else:
        x, y, w, h = map(float, row["bbox"])
        shape = Shape.of([x, y, w, h])
        area = w * h if area is None else area
    if is_truth:
        return _Row(shape, area, 0.0, bool(row.get("iscrowd", 0)))
    return _Row(shape, area, float(row.get("score", 1.0)), False)


def _counted(detections: Sequence[_Row]) -> list[_Row]:
    """Returns the detections that are among the first MAX_DETS by score or in the given order, in that order."""
    if len(detections) <= MAX_DETS:
        return list(detections)
    by_score = np.argsort([-one.score for one in detections], kind="stable")
    return [detections[n] for n in sorted({*range(len(detections[:MAX_DETS])), *by_score[:MAX_DETS].tolist()})]


def _group(category: int, detections: Sequence[_Row], truths: Sequence[_Row]) -> Group:
    shapes = [one.shape for one in detections]
    crowds = [n for n, one in enumerate(truths) if one.is_crowd]
    objects = [n for n, one in enumerate(truths) if not one.is_crowd] if crowds else range(len(truths))
    inside, index = crowd_overlaps(shapes, [truths[n].shape for n in crowds])
    return Group(
        category,
        det_areas=np.array([one.area for one in detections], dtype=np.float64),
        truth_areas=np.array([truths[n].area for n in objects], dtype=np.float64),
        truth_order=np.array(objects, dtype=np.int64),
        iou=iou_matrix(shapes, [truths[n].shape for n in objects]),
        crowd_overlap=inside,
        crowd_order=np.where(index < 0, -1, np.append(crowds, -1)[index]) if crowds else index,
    )


def _code(segmentation: Any, image: Mapping[str, Any], name: str) -> Rle:
    if isinstance(segmentation, Rle):
        return segmentation
    if isinstance(segmentation, dict):
        return Rle.from_coco(segmentation, name)
    if "height" not in image or "width" not in image:
        raise BadDataset(f"{name}: polygons need the width and height of image {image['id']!r}")
    return rle.from_segmentation(segmentation, image["height"], image["width"], name)

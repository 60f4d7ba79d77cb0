"""COCO's twelve metrics of masks or boxes: the numbers that pycocotools computes, in a fraction of its time."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np

from mal_train.core.coco.annotations import Annotation, JsonId, id_order
from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.masks.rle import Rle
from mal_train.core.metrics.average_precision import (
    AP_NAMES,
    LVIS_NAMES,
    MAX_DETS,
    Bools,
    Floats,
    Groups,
    Integers,
    coco_summary,
)
from mal_train.core.metrics.lvis import Federation, lvis_summary
from mal_train.core.metrics.miou import CocoMetrics
from mal_train.core.metrics.overlaps import Form, IouType, crowd_overlaps, iou_of_groups, mask_areas
from mal_train.core.numbers import finite_number

Scores = Literal["one", "score"]
NO_CATEGORY_ID: Final = ""
"""Category of rows without one: together they make up one category."""
_Pair: TypeAlias = tuple[JsonId, JsonId]
"""A category and an image."""


@dataclass(frozen=True, eq=False)
class ApInput:
    """Detections and ground truth with their overlaps; gives COCO's and LVIS's metrics for both kinds of scores.

    Detections that count for none of them are left out.

    Attributes:
        groups: the detections and ground truths.
        scores: (D,) of the detections.
        in_coco: (D,) detections that COCO counts.
        in_lvis: (D,) detections that LVIS counts, for each kind of scores; empty without a federation.
        frequencies: LVIS's frequency of each category, by its index in the groups.
    """

    groups: Groups
    scores: Floats
    in_coco: Bools
    in_lvis: Mapping[Scores, Bools] = field(default_factory=dict)
    frequencies: list[str] = field(default_factory=list)

    def lvis_metrics(self, scores: Scores = "score") -> CocoMetrics:
        """Computes the metrics of LVIS_NAMES, for an input with a federation; see `metrics`."""
        is_counted = self.in_lvis[scores]
        groups = self.groups.without_crowds().of_detections(is_counted)
        return _known(LVIS_NAMES, lvis_summary(groups, self._scores(scores)[is_counted], self.frequencies))

    def metrics(self, scores: Scores = "score") -> CocoMetrics:
        """Computes the metrics of AP_NAMES; None where no instance defines one.

        Args:
            scores: "one" sets every score to 1; ties are then decided by the order of images and rows.
        """
        groups = replace(self.groups, is_exhaustive=np.ones_like(self.groups.is_exhaustive))
        return _known(AP_NAMES, coco_summary(groups.of_detections(self.in_coco), self._scores(scores)[self.in_coco]))

    def _scores(self, scores: Scores) -> Floats:
        return self.scores if scores == "score" else np.ones_like(self.scores)


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


def category_of(annotation: Annotation) -> JsonId:
    """Returns the category in which a row counts."""
    return NO_CATEGORY_ID if annotation.category_id is None else annotation.category_id


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
        federation: which categories are judged in which image, for LVIS's metrics, which ignore crowd regions; None: no
            such metrics.

    Raises:
        BadDataset: a malformed mask, or a result for an image that is not in the ground truth.
    """
    images = {image["id"]: image for image in truth["images"]}
    # A category without ground truth has no AP, so its detections are ignored.
    known = {row["category_id"] for row in truth["annotations"]}
    pairs: dict[_Pair, int] = {}
    truths, detections = _Columns(), _Columns()
    for row_type, rows, columns in (("annotation", truth["annotations"], truths), ("result", results, detections)):
        for number, row in enumerate(rows, start=1):
            if row["category_id"] not in known:
                continue
            name = f"{row_type} {number}"
            if row["image_id"] not in images:
                raise BadDataset(f"{name}: image_id {row['image_id']!r} is not among the images of the ground truth")
            pair = pairs.setdefault((row["category_id"], row["image_id"]), len(pairs))
            image = images[row["image_id"]]
            columns.add(pair, row, image, name, iou_type, number=number - 1, is_truth=columns is truths)
    keys = _in_order(pairs)
    place = np.empty(len(keys), dtype=np.int64)
    place[[pairs[key] for key in keys]] = np.arange(len(keys))
    numbers = {category: n for n, category in enumerate(sorted(known, key=id_order))}
    detected = detections.rows(place)
    in_coco = _in_coco(detected, len(keys))
    in_lvis: dict[Scores, Bools] = {}
    if federation is not None:
        objects = [row for row in truth["annotations"] if not row.get("iscrowd")]
        in_lvis["one"] = federation.counted(objects, results, by_score=False)[detected.numbers]
        in_lvis["score"] = federation.counted(objects, results, by_score=True)[detected.numbers]
    is_counted = np.logical_or.reduce([in_coco, *in_lvis.values()])
    groups, scores = _groups(
        np.array([numbers[category] for category, _ in keys], dtype=np.int64),
        np.array([_is_exhaustive(federation, *key) for key in keys], dtype=np.bool_),
        truths.rows(place),
        detected.take(is_counted),
    )
    frequencies = {} if federation is None else federation.frequencies
    return ApInput(
        groups,
        scores,
        in_coco[is_counted],
        {name: one[is_counted] for name, one in in_lvis.items()},
        [frequencies.get(category, "") for category in numbers],
    )


def _in_order(pairs: Iterable[_Pair]) -> list[_Pair]:
    """Returns pairs by category, then by image."""
    images: dict[JsonId, list[JsonId]] = {}
    for category, image_id in pairs:
        images.setdefault(category, []).append(image_id)
    # One sort for each category: a long one holds the interpreter, and images mostly come in order.
    return [
        (category, image_id)
        for category in sorted(images, key=id_order)
        for image_id in sorted(images[category], key=id_order)
    ]


def _is_exhaustive(federation: Federation | None, category: JsonId, image_id: JsonId) -> bool:
    return federation is None or category not in federation.not_exhaustive.get(image_id, ())


class _Rows(NamedTuple):
    """Detections or ground truths (N,), by the place of their pair of category and image, in order of the file.

    `numbers` are their indices in the file.
    """

    numbers: Integers
    places: Integers
    forms: list[Form]
    areas: Floats
    scores: Floats
    is_crowd: Bools

    def starts(self, pairs: int) -> Integers:
        """Returns the first row of each pair, and the number of all."""
        return np.searchsorted(self.places, np.arange(pairs + 1))

    def take(self, index: Integers | Bools) -> "_Rows":
        """Returns some of the rows."""
        taken = np.arange(self.places.size)[index]
        if taken.size == self.places.size and not np.any(np.diff(taken) < 0):
            return self
        forms = [self.forms[n] for n in taken.tolist()]
        numbers, places, _, areas, scores, is_crowd = self
        return _Rows(numbers[taken], places[taken], forms, areas[taken], scores[taken], is_crowd[taken])


class _Columns:
    """Rows of a file as they are read: their pair of category and image, and the values that decide their matches."""

    def __init__(self) -> None:
        self._numbers = array("q")
        self._pairs = array("q")
        self._forms: list[Form] = []
        self._areas = array("d")
        self._scores = array("d")
        self._is_crowd = bytearray()

    def add(
        self,
        pair: int,
        row: Mapping[str, Any],
        image: Mapping[str, Any],
        name: str,
        iou_type: IouType,
        *,
        number: int,
        is_truth: bool,
    ) -> None:
        """Reads one row, by its index in the file. Raises BadDataset for a malformed mask."""
        area = finite_number(row.get("area")) if is_truth else None
        if iou_type == "segm":
            self._forms.append(_code(row.get("segmentation"), image, name))
        else:
            box = [float(value) for value in row["bbox"]]
            self._forms.append(box)
            area = box[2] * box[3] if area is None else area
        self._numbers.append(number)
        self._pairs.append(pair)
        self._areas.append(math.nan if area is None else area)  # that of the mask
        self._scores.append(0.0 if is_truth else float(row.get("score", 1.0)))
        self._is_crowd.append(is_truth and bool(row.get("iscrowd", 0)))

    def rows(self, places: Integers) -> _Rows:
        """Returns the rows in order of the places of their pairs, which are given by pair."""
        areas = np.array(self._areas)
        unknown = np.flatnonzero(np.isnan(areas)).tolist()
        masks = {n: form for n in unknown if isinstance(form := self._forms[n], Rle)}
        areas[list(masks)] = mask_areas(list(masks.values()))
        unordered = _Rows(
            np.array(self._numbers),
            places[np.array(self._pairs)],
            self._forms,
            areas,
            np.array(self._scores),
            np.frombuffer(self._is_crowd, dtype=np.bool_),
        )
        return unordered.take(np.argsort(unordered.places, kind="stable"))


def _in_coco(rows: _Rows, pairs: int) -> Bools:
    """Returns True (N,) for the rows that are among the first MAX_DETS of their pair by score or in the given order."""
    starts = rows.starts(pairs)
    is_counted = np.ones(rows.places.size, dtype=np.bool_)
    for n in np.flatnonzero(np.diff(starts) > MAX_DETS).tolist():
        by_score = np.argsort(-rows.scores[starts[n] : starts[n + 1]], kind="stable")
        is_counted[starts[n] + MAX_DETS : starts[n + 1]] = False
        is_counted[starts[n] + by_score[:MAX_DETS]] = True
    return is_counted


def _groups(categories: Integers, is_exhaustive: Bools, truths: _Rows, detections: _Rows) -> tuple[Groups, Floats]:
    """Returns the groups with a detection or an object, and the scores of the detections."""
    objects = truths.take(~truths.is_crowd)
    inside, crowd_order = _crowds(detections, truths, categories.size)
    order = np.arange(truths.places.size) - truths.starts(categories.size)[truths.places]
    det_starts, truth_starts = detections.starts(categories.size), objects.starts(categories.size)
    # Crowd regions alone decide nothing.
    is_kept = (np.diff(det_starts) > 0) | (np.diff(truth_starts) > 0)
    ends = np.append(is_kept, True)
    det_starts, truth_starts = det_starts[ends], truth_starts[ends]
    groups = Groups(
        categories=categories[is_kept],
        det_starts=det_starts,
        truth_starts=truth_starts,
        is_exhaustive=is_exhaustive[is_kept],
        det_areas=detections.areas,
        truth_areas=objects.areas,
        truth_order=order[~truths.is_crowd],
        iou=iou_of_groups(detections.forms, objects.forms, det_starts, truth_starts),
        crowd_overlap=inside,
        crowd_order=crowd_order,
    )
    return groups, detections.scores


def _crowds(detections: _Rows, truths: _Rows, pairs: int) -> tuple[Floats, Integers]:
    """Returns `Groups.crowd_overlap` and `Groups.crowd_order`."""
    inside, order = np.zeros(detections.places.size), np.full(detections.places.size, -1)
    det_starts, truth_starts = detections.starts(pairs), truths.starts(pairs)
    for n in np.unique(truths.places[truths.is_crowd]).tolist():
        own = slice(det_starts[n], det_starts[n + 1])
        crowds = np.flatnonzero(truths.is_crowd[truth_starts[n] : truth_starts[n + 1]])
        regions = [truths.forms[truth_starts[n] + crowd] for crowd in crowds.tolist()]
        inside[own], index = crowd_overlaps(detections.forms[own], regions)
        order[own] = crowds[index]
    return inside, order


def _code(segmentation: Any, image: Mapping[str, Any], name: str) -> Rle:
    if isinstance(segmentation, Rle):
        return segmentation
    if isinstance(segmentation, dict):
        return Rle.from_coco(segmentation, name)
    if "height" not in image or "width" not in image:
        raise BadDataset(f"{name}: polygons need the width and height of image {image['id']!r}")
    return rle.from_segmentation(segmentation, image["height"], image["width"], name)

"""Compares masks with ground truth, one instance at a time and in any order.

Training's validation, `mal-train evaluate`, the server and the offline comparison of two files use it, so all of them
report the same metrics for the same masks.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mal_train.core.coco.annotations import NO_CATEGORY, Annotation, CocoFile, JsonId, Reason, id_order, row_name
from mal_train.core.coco.fields import has_segmentation
from mal_train.core.coco.ground_truth import read_ground_truth
from mal_train.core.coco.json_values import as_json
from mal_train.core.coco.left_out import LeftOut
from mal_train.core.coco.output import mask_score_of
from mal_train.core.errors import BadDataset, BadGroundTruth
from mal_train.core.masks import rle
from mal_train.core.masks.geometry import box_area
from mal_train.core.masks.rle import Rle
from mal_train.core.metrics.coco_ap import ap_input, category_of
from mal_train.core.metrics.lvis import Federation
from mal_train.core.metrics.miou import CocoMetrics, InstanceIoU, mean_iou, mean_or_none
from mal_train.core.metrics.report import CROWD, GOOD_IOU, CategoryRow, EvaluationReport, Skipped
from mal_train.core.metrics.score_quality import score_quality
from mal_train.core.numbers import finite_number
from mal_train.core.threads import clear_in_parts

MAX_SCORE = 1e9
"""Largest score of a label, so that sums and means of scores are finite; those of this project lie in [0, 1]."""
MEMORY_OF_A_PAIR = 5000
"""Bytes of a compared mask without its two run-length codes: 600 kept, up to 4 400 more while the report is made."""
MEMORY_OF_A_CATEGORY = 17_000
"""Bytes of a category with compared masks, while the report is made: a precision for each threshold and recall."""
MEMORY_OF_A_SKIPPED = 350
"""Bytes of a skipped row without its message."""
MEMORY_OF_A_MESSAGE = 450
"""Bytes of the longest message of a crowd region."""
MEMORY_OF_A_CROWD = 1500
"""Bytes of a crowd region without its run-length code: 500 kept, up to 1 000 more while the report is made."""


def memory_of(objects: int, crowds: int, code_bytes: int, categories: int = 0) -> int:
    """Returns the most bytes that an evaluator and its report take for the objects and crowd regions of an image.

    Args:
        objects: rows that are not crowd regions.
        crowds: crowd regions.
        code_bytes: bytes of all run-length codes: ground truth, crowd regions and predictions.
        categories: categories of the objects that the evaluator has not compared a mask of.
    """
    rows = objects * MEMORY_OF_A_PAIR + crowds * (MEMORY_OF_A_CROWD + MEMORY_OF_A_SKIPPED + MEMORY_OF_A_MESSAGE)
    return rows + code_bytes + categories * MEMORY_OF_A_CATEGORY


@dataclass(frozen=True, slots=True)
class InstanceComparison:
    """A compared mask with the run-length codes of prediction and ground truth, for drawing it."""

    row: InstanceIoU
    truth: Rle
    prediction: Rle


_Pair = tuple[JsonId, JsonId, JsonId, float, float, int, float, int, int, bytes, bytes]
"""The fields of an `InstanceIoU`, height and width of both masks, and their run-length codes: truth, prediction.

A plain tuple of numbers and bytes is nothing to Python's garbage collector. Objects would be: a full collection over
the 300 000 of a data set stops all threads for half a second.
"""

_SkippedRow = tuple[JsonId | None, JsonId | None, str, str]
"""The fields of a `Skipped`, as a plain tuple for the same reason."""


@dataclass(frozen=True, slots=True)
class _Crowd:
    """A crowd region; `number` is its place in `Evaluator.skipped`."""

    number: int
    image_id: JsonId
    category_id: JsonId
    region: Rle | list[Any]


class Evaluator:
    """Collects masks with their ground truth and computes the report; keeps run-length codes, never decoded masks.

    An annotation counts once (its id within its image). Rows without a usable ground truth, crowd regions and rows
    without a prediction are not counted; each is listed in `skipped`. Detections in crowd regions are ignored in AP, as
    in COCO; a crowd region is read in the frame of the first prediction of its image.

    Args:
        category_names: names by category id, in the order of the report (`CocoFile.category_names`).
        federation: what is judged in which image, for LVIS's metrics; may grow until the report. None: no such metrics.

    Attributes:
        memory: bytes that the added rows take, including the computation of the report.
    """

    def __init__(self, category_names: Mapping[JsonId, str], federation: Federation | None = None) -> None:
        self._names = dict(category_names)
        self.federation = federation
        self._pairs: list[_Pair] = []
        self._skipped: list[_SkippedRow] = []
        self._compared_categories: set[JsonId] = set()
        self._crowds: list[_Crowd] = []
        self._waiting: dict[JsonId, list[_Crowd]] = {}
        self._frames: dict[JsonId, tuple[int, int]] = {}
        self._seen: set[tuple[JsonId | None, JsonId]] = set()
        self._iou_sum = 0.0
        self.memory = 0

    @property
    def count(self) -> int:
        """Number of instances compared so far."""
        return len(self._pairs)

    @property
    def running_miou(self) -> float | None:
        """Mean IoU so far; None before the first instance."""
        return self._iou_sum / len(self._pairs) if self._pairs else None

    def add(
        self,
        annotation: Annotation,
        prediction: Rle | None,
        score: float,
    ) -> None:
        """Compares one predicted mask with the `segmentation` of its annotation.

        Args:
            annotation: ground truth; polygons or run lengths in `annotation.raw["segmentation"]`.
            prediction: the mask in the frame of the image; None = no mask was made: the row is skipped, not counted as
                wrong. An empty mask counts.
            score: score of the mask, finite.

        Raises:
            ValueError: the score is not finite.
        """
        if not math.isfinite(score):
            raise ValueError(f"{row_name(annotation.id)}: score {score}; it must be finite")
        if annotation.reason is not None:
            self.skip(annotation, annotation.reason, annotation.problem or "")
            return
        annotation_id, image_id = annotation.id, annotation.image_id
        category_id = category_of(annotation)
        if annotation_id is None or image_id is None:
            self.skip(annotation, Reason.BAD_ID, "annotation and image must have an id")
            return
        key = (image_id, annotation_id)
        if key in self._seen:
            self.skip(
                annotation, Reason.REPEATED, f"{row_name(annotation.id)}: used more than once; the first one counts"
            )
            return
        self._seen.add(key)
        if annotation.iscrowd:
            self._add_crowd(annotation, image_id, category_id)
            return
        if prediction is None:
            has_truth = has_segmentation(annotation.raw)
            missing = (Reason.NOT_ANSWERED, "predicted mask") if has_truth else (Reason.NO_GROUND_TRUTH, "segmentation")
            self.skip(annotation, missing[0], f"{row_name(annotation.id)}: has no {missing[1]}")
            return
        truth = self._truth(annotation, image_id, (prediction.height, prediction.width))
        if truth is None:
            return
        iou = rle.iou(truth, prediction)
        area, box = rle.area(truth), box_area(annotation.box_xywh)
        self._iou_sum += iou
        ids = annotation_id, image_id, category_id
        frame = truth.height, truth.width
        self._pairs.append((*ids, iou, float(score), area, box, *frame, truth.counts, prediction.counts))
        if category_id not in self._compared_categories:
            self._compared_categories.add(category_id)
            self.memory += MEMORY_OF_A_CATEGORY
        self.memory += MEMORY_OF_A_PAIR + len(truth.counts) + len(prediction.counts)

    @property
    def compared(self) -> list[InstanceComparison]:
        """The compared masks, lowest IoU first; masks of equal IoU in id order."""
        return [_comparison(pair) for pair in _by_iou(_by_id(self._pairs))]

    @property
    def rows(self) -> list[InstanceIoU]:
        """The compared masks without their codes, in order of arrival."""
        return list(map(_instance, self._pairs))

    @property
    def first_messages(self) -> dict[str, str]:
        """Message of the first row that was not counted, by reason."""
        messages: dict[str, str] = {}
        for _, _, reason, message in self._skipped:
            messages.setdefault(reason, message)
        return messages

    @property
    def skipped(self) -> list[Skipped]:
        """Rows that were not counted, in order of arrival."""
        return [Skipped(*row) for row in self._skipped]

    def rescore(self, scores: Iterable[float]) -> None:
        """Replaces the scores of the compared masks, in the order of `rows`."""
        self._pairs = [(*pair[:4], float(score), *pair[5:]) for pair, score in zip(self._pairs, scores, strict=True)]

    def skip(self, annotation: Annotation, reason: str, message: str) -> None:
        """Records a row that cannot be counted, for example because its image cannot be read."""
        self._skipped.append((annotation.id, annotation.image_id, str(reason), message))
        self.memory += MEMORY_OF_A_SKIPPED + len(message)

    def report(self, *, ap: bool = True, listed: int | None = None) -> EvaluationReport:
        """Computes the report over all added rows; it does not depend on their order.

        Args:
            ap: also compute COCO's metrics, by far the slowest part.
            listed: number of rows in `worst` and in `skipped_rows`; None: all.
        """
        pairs = _by_id(self._pairs)
        ap_at_1, ap_at_score, lvis_at_1, lvis_at_score = self._average_precision(pairs) if ap else ({}, {}, {}, {})
        rows = list(map(_instance, pairs))
        scores, ious = [row.score for row in rows], [row.iou for row in rows]
        miou = mean_iou(rows)
        report = EvaluationReport(
            images=None,
            overall=miou.overall,
            by_size=miou.by_size,
            class_miou=miou.class_mean,
            class_miou_by_box_size=miou.class_mean_by_box_size,
            share_good=mean_or_none(np.asarray(ious) > GOOD_IOU),
            ap_at_1=ap_at_1,
            ap_at_score=ap_at_score,
            lvis_at_1=lvis_at_1,
            lvis_at_score=lvis_at_score,
            score=score_quality(scores, ious),
            categories=self._category_rows(rows),
            worst=tuple(map(_instance, _by_iou(pairs)[:listed])),
            skipped=dict(Counter(reason for _, _, reason, _ in self._skipped).most_common()),
            skipped_rows=tuple(Skipped(*row) for row in self._skipped[:listed]),
        )
        clear_in_parts(rows)
        return report

    def clear(self) -> None:
        """Forgets all rows; unlike their end with the evaluator, this lets other threads run meanwhile."""
        for rows in (self._pairs, self._skipped, self._crowds):
            clear_in_parts(rows)
        for known in (self._seen, self._frames):
            clear_in_parts(known)

    def _average_precision(self, pairs: Sequence[_Pair]) -> tuple[CocoMetrics, CocoMetrics, CocoMetrics, CocoMetrics]:
        """Computes COCO's metrics with every score set to 1 and with the scores of the masks, then LVIS's metrics."""
        truth, results = self._as_coco(pairs)
        # One input for all: the overlaps are the slow part.
        overlaps = ap_input(truth, results, federation=self.federation)
        for used in (truth["annotations"], truth["images"], results):
            clear_in_parts(used)
        lvis: tuple[CocoMetrics, CocoMetrics] = {}, {}
        if self.federation is not None:
            lvis = overlaps.lvis_metrics("one"), overlaps.lvis_metrics("score")
        return overlaps.metrics("one"), overlaps.metrics("score"), *lvis

    def _truth(self, annotation: Annotation, image_id: JsonId, frame: tuple[int, int]) -> Rle | None:
        """Reads the ground-truth mask in the frame (height, width) of its prediction; None after skipping the row."""
        name = row_name(annotation.id)
        if image_id not in self._frames:
            self._frames[image_id] = frame
            for crowd in self._waiting.pop(image_id, ()):
                self._keep_crowd(crowd, frame)
        known = self._frames[image_id]
        if known != frame:
            message = f"{name}: mask of {frame[1]}x{frame[0]} px; its image has {known[1]}x{known[0]} px"
            self.skip(annotation, Reason.FRAME_MISMATCH, message)
        else:
            try:
                return read_ground_truth(annotation.raw, frame, name)
            except BadGroundTruth as error:
                self.skip(annotation, error.reason, str(error))
        return None

    def _add_crowd(self, annotation: Annotation, image_id: JsonId, category_id: JsonId) -> None:
        self.skip(annotation, Reason.CROWD, f"{row_name(annotation.id)}: crowd regions are not counted")
        segmentation, number = annotation.raw.get("segmentation"), len(self._skipped) - 1
        if not segmentation:
            return
        try:
            region = Rle.from_coco(segmentation, "mask") if isinstance(segmentation, dict) else segmentation
        except BadDataset as error:
            self._explain(number, error)
            return
        crowd = _Crowd(number, image_id, category_id, region)
        self.memory += MEMORY_OF_A_CROWD + (len(region.counts) if isinstance(region, Rle) else 0)
        if image_id in self._frames:
            self._keep_crowd(crowd, self._frames[image_id])
        else:
            self._waiting.setdefault(image_id, []).append(crowd)

    def _keep_crowd(self, crowd: _Crowd, frame: tuple[int, int]) -> None:
        """Keeps a crowd region as a mask of its image; explains in its skipped row if that is impossible."""
        region, (height, width) = crowd.region, frame
        try:
            if not isinstance(region, Rle):
                region = rle.from_segmentation(region, height, width, "mask")
                self.memory += len(region.counts)
            elif (region.height, region.width) != frame:
                raise BadDataset(f"mask of {region.width}x{region.height} px on an image of {width}x{height} px")
        except BadDataset as error:
            self._explain(crowd.number, error)
        else:
            self._crowds.append(replace(crowd, region=region))

    def _explain(self, number: int, error: BadDataset) -> None:
        annotation_id, image_id, reason, known = self._skipped[number]
        message = f"{known}, and this one cannot be read ({error})"
        self.memory += len(message) - len(known)
        self._skipped[number] = annotation_id, image_id, reason, message

    def _as_coco(self, pairs: Sequence[_Pair]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        truth: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        for number, pair in enumerate(map(_comparison, pairs)):
            ids = {"image_id": pair.row.image_id, "category_id": pair.row.category_id}
            truth.append({**ids, "id": number, "segmentation": pair.truth, "area": pair.row.area})
            results.append({**ids, "segmentation": pair.prediction, "score": pair.row.score})
        for crowd in self._crowds:
            ids = {"image_id": crowd.image_id, "category_id": crowd.category_id}
            truth.append({**ids, "id": len(truth), "segmentation": crowd.region, "iscrowd": 1})
        images = [{"id": image_id} for image_id in self._frames]
        return {"images": images, "annotations": truth}, results

    def _category_rows(self, rows: Iterable[InstanceIoU]) -> tuple[CategoryRow, ...]:
        groups: dict[JsonId, list[InstanceIoU]] = {category_id: [] for category_id in self._names}
        for row in rows:
            groups.setdefault(row.category_id, []).append(row)
        return tuple(
            CategoryRow(
                category_id=category_id,
                name=self._names.get(category_id, str(category_id) or NO_CATEGORY),
                count=len(group),
                miou=float(np.mean([row.iou for row in group])),
                share_good=float(np.mean([row.iou > GOOD_IOU for row in group])),
                mean_score=float(np.mean([row.score for row in group])),
            )
            for category_id, group in groups.items()
            if group
        )


def _is_int64(value: object) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _instance(pair: _Pair) -> InstanceIoU:
    return InstanceIoU(*pair[:7])


def _comparison(pair: _Pair) -> InstanceComparison:
    height, width, truth, prediction = pair[7:]
    return InstanceComparison(_instance(pair), Rle(height, width, truth), Rle(height, width, prediction))


def _by_id(pairs: Sequence[_Pair]) -> list[_Pair]:
    """Returns the pairs in order of their images and annotations."""
    if all(_is_int64(pair[0]) and _is_int64(pair[1]) for pair in pairs):
        # As numbers: NumPy sorts without the interpreter, which a long `sorted` holds for seconds.
        annotations, images = (np.fromiter((pair[k] for pair in pairs), np.int64, len(pairs)) for k in (0, 1))
        return [pairs[index] for index in np.lexsort((annotations, images))]
    return sorted(pairs, key=lambda pair: (id_order(pair[1]), id_order(pair[0])))


def _by_iou(pairs: Sequence[_Pair]) -> list[_Pair]:
    """Returns the pairs, lowest IoU first; those of equal IoU in their order."""
    ious = np.fromiter((pair[3] for pair in pairs), np.float64, len(pairs))
    return [pairs[index] for index in np.argsort(ious, kind="stable")]


def evaluate_labels(truth: CocoFile, labels: CocoFile, *, ap: bool = True) -> EvaluationReport:
    """Compares the annotations of a labeled file with those of the same ids in a ground-truth file.

    Labels with `error`, without a readable mask or without ground truth are skipped with their reason. A label without
    `score` counts with score 1.
    """
    evaluator = Evaluator(truth.category_names, Federation.of(truth))
    by_id = {label.id: label for label in labels.annotations if label.id is not None}
    for annotation in truth.annotations:
        label = by_id.pop(annotation.id, None) if annotation.id is not None else None
        image = truth.images.get(annotation.image_id) if annotation.image_id is not None else None
        size = image.size_wh if image is not None else None
        image_hw = (size[1], size[0]) if size is not None else None
        if annotation.problem is not None or annotation.iscrowd or label is None:
            evaluator.add(annotation, None, 0.0)
        else:
            _add_label(evaluator, annotation, label, image_hw)
    for label in by_id.values():
        evaluator.skip(label, Reason.NO_GROUND_TRUTH, f"{row_name(label.id)}: not in the ground-truth file")
    return evaluator.report(ap=ap)


def _add_label(
    evaluator: Evaluator, annotation: Annotation, label: Annotation, image_hw: tuple[int, int] | None
) -> None:
    name = row_name(label.id)
    failure, segmentation, stated_score = (
        label.raw.get("error"),
        label.raw.get("segmentation"),
        mask_score_of(label.raw),
    )
    if failure is not None or segmentation is None:
        reason = failure.get("reason") if isinstance(failure, dict) else None
        evaluator.skip(annotation, str(reason or Reason.NOT_ANSWERED), f"{name}: has no predicted mask")
        return
    score = 1.0 if stated_score is None else finite_number(stated_score)
    if score is None or abs(score) > MAX_SCORE:
        message = f"{name}: score {as_json(stated_score)}; it must be a number of at most {MAX_SCORE:g} in size"
        evaluator.skip(annotation, Reason.NOT_ANSWERED, message)
        return
    try:
        if image_hw is not None:
            mask = rle.from_segmentation(segmentation, *image_hw, name)
        else:
            mask = Rle.from_coco(segmentation, name)
    except BadDataset as error:
        evaluator.skip(annotation, Reason.NOT_ANSWERED, str(error))
        return
    evaluator.add(annotation, mask, score)


def not_measured(skipped: Iterable[Skipped]) -> LeftOut:
    """Returns the skipped rows of an evaluation that should have been measured."""
    rows = LeftOut()
    for row in skipped:
        if row.reason != CROWD:
            rows.add(row.reason, row.message, row.annotation_id)
    return rows

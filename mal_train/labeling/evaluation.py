"""How good masks are against ground truth: IoU tables, COCO's twelve figures, and how well the score ranks them.

Fed one instance at a time and in any order by training's validation, `mal-train evaluate`, the server and offline
comparison of two files; all get the same report for the same masks. pycocotools computes the COCO figures.
"""

import importlib.util
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mal_train.errors import BadDataset
from mal_train.labeling import rle
from mal_train.labeling.coco import Annotation, CocoFile, JsonId, Reason, id_order
from mal_train.labeling.geometry import box_area
from mal_train.labeling.rle import Rle
from mal_train.labeling.settings import SIZE_NAMES, size_class

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl")
"""COCO's twelve figures in pycocotools' order, under the names of the published code (§6.2)."""

BAD_IOU = 0.5
GOOD_IOU = 0.75
WORST_SHARE = 0.2

Figures = dict[str, float | None]
"""Named figures; None where no instance speaks for one (pycocotools writes -1)."""


@dataclass(frozen=True, slots=True)
class InstanceIoU:
    """One compared mask.

    Attributes:
        annotation_id: of the ground truth.
        image_id: likewise.
        category_id: likewise.
        iou: in [0, 1]; 0 when both masks are empty.
        score: what the labeler claimed.
        area: ground-truth mask pixels; decides the size class of tables and AP.
        box_area: px²; decides the size class of the published figures.
    """

    annotation_id: JsonId
    image_id: JsonId
    category_id: JsonId
    iou: float
    score: float
    area: int
    box_area: float


@dataclass(frozen=True, slots=True)
class Skipped:
    """A ground-truth row that was not counted, and why."""

    annotation_id: JsonId | None
    image_id: JsonId | None
    reason: str
    message: str


@dataclass(frozen=True)
class MiouResult:
    """Mean IoU of instances.

    Attributes:
        count: instances.
        overall: mean over instances.
        by_size: mean over instances of each size class by ground-truth mask area.
        count_by_size: instances of each.
        class_mean: mean over classes of class means (the published mIoU).
        class_mean_by_box_size: the same within each size class by box area (the published mIoU_small …, which that
            code computes right only for a batch of one).
    """

    count: int
    overall: float | None
    by_size: Figures
    count_by_size: dict[str, int]
    class_mean: float | None
    class_mean_by_box_size: Figures


@dataclass(frozen=True)
class ScoreQuality:
    """What the score is worth for finding bad masks.

    Attributes:
        mean_score: mean over instances.
        bias: mean score minus mean IoU; positive = over-confident.
        calibration_error: mean over instances of |mean score − mean IoU| of their score bin (ten equal bins).
        spearman: rank correlation of score and IoU; None when one of them is constant.
        bad_count: masks with IoU < 0.5.
        bad_in_worst_fifth: share of those among the worst-scored 20 % of masks; a random order gives 0.2.
    """

    mean_score: float | None
    bias: float | None
    calibration_error: float | None
    spearman: float | None
    bad_count: int
    bad_in_worst_fifth: float | None


@dataclass(frozen=True)
class CategoryRow:
    """One line of the per-category table; means over its instances."""

    category_id: JsonId
    name: str
    count: int
    miou: float
    share_good: float
    mean_score: float


@dataclass(frozen=True)
class EvaluationReport:
    """Everything an evaluation says.

    Attributes:
        miou: IoU tables.
        share_good: share of masks with IoU > 0.75.
        empty_ground_truth: instances whose ground-truth mask has no pixel; they count with IoU 0, as in COCO.
        ap_at_1: COCO's figures with all scores 1, images in id order (ties make AP depend on the order by ±0.004).
        ap_at_score: COCO's figures with the labeler's scores. Both are {} when AP was not asked for.
        score: how well the score ranks masks.
        categories: in the order of the data set's list, only those with instances.
        worst_first: every instance, lowest IoU first.
        skipped: rows that were not counted.
    """

    miou: MiouResult
    share_good: float | None
    empty_ground_truth: int
    ap_at_1: Figures
    ap_at_score: Figures
    score: ScoreQuality
    categories: tuple[CategoryRow, ...]
    worst_first: tuple[InstanceIoU, ...]
    skipped: tuple[Skipped, ...]

    @property
    def skipped_by_reason(self) -> dict[str, int]:
        """Number of rows not counted, by reason, most frequent first."""
        return dict(Counter(row.reason for row in self.skipped).most_common())

    def to_dict(self, worst: int | None = 100) -> dict[str, Any]:
        """JSON form; only the `worst` lowest instances and skipped rows are listed (None = all), counts are whole."""
        return {
            "count": self.miou.count,
            "mIoU": self.miou.overall,
            "mIoU_by_size": self.miou.by_size,
            "count_by_size": self.miou.count_by_size,
            "mIoU_class": self.miou.class_mean,
            "mIoU_class_by_box_size": self.miou.class_mean_by_box_size,
            "share_IoU_above_0.75": self.share_good,
            "empty_ground_truth": self.empty_ground_truth,
            "AP@1": self.ap_at_1,
            "AP@score": self.ap_at_score,
            "mean_score": self.score.mean_score,
            "score_bias": self.score.bias,
            "calibration_error": self.score.calibration_error,
            "spearman": self.score.spearman,
            "count_IoU_below_0.5": self.score.bad_count,
            "bad_in_worst_scored_fifth": self.score.bad_in_worst_fifth,
            "categories": [
                {
                    "category_id": row.category_id,
                    "name": row.name,
                    "count": row.count,
                    "mIoU": row.miou,
                    "share_IoU_above_0.75": row.share_good,
                    "mean_score": row.mean_score,
                }
                for row in self.categories
            ],
            "worst_first": [
                {"annotation_id": row.annotation_id, "image_id": row.image_id, "IoU": row.iou, "score": row.score}
                for row in self.worst_first[:worst]
            ],
            "skipped_by_reason": self.skipped_by_reason,
            "skipped": [
                {
                    "annotation_id": row.annotation_id,
                    "image_id": row.image_id,
                    "reason": row.reason,
                    "message": row.message,
                }
                for row in self.skipped[:worst]
            ],
        }

    def table(self, worst_categories: int = 10) -> str:
        """The report as text for a terminal, with the categories of lowest mIoU."""
        size_counts = self.miou.count_by_size
        lines = [f"{self.miou.count} masks compared", "", f"{'mIoU':<12}{_figure(self.miou.overall)}"]
        lines += [f"  {name:<10}{_figure(self.miou.by_size[name])}   {size_counts[name]:>7}" for name in SIZE_NAMES]
        lines += [
            f"{'mIoU_class':<12}{_figure(self.miou.class_mean)}",
            f"{'IoU > 0.75':<12}{_figure(self.share_good)}   of the masks",
        ]
        if self.ap_at_1:
            lines += ["", f"{'':<12}{'scores 1':>8}  {'scores':>8}"]
            lines += [f"{k:<12}{_figure(self.ap_at_1[k]):>8}  {_figure(self.ap_at_score[k]):>8}" for k in AP_NAMES]
        lines += [
            "",
            f"score: mean {_figure(self.score.mean_score)}, bias {_figure(self.score.bias)}, calibration error "
            f"{_figure(self.score.calibration_error)}, Spearman with IoU {_figure(self.score.spearman)}",
            f"masks with IoU < 0.5: {self.score.bad_count}; the worst-scored 20 % hold "
            f"{_figure(self.score.bad_in_worst_fifth)} of them",
        ]
        lowest = sorted(self.categories, key=lambda row: row.miou)[:worst_categories]
        if lowest:
            lines += ["", f"{'lowest categories':<24}{'mIoU':>6}  {'count':>7}"]
            lines += [f"{row.name[:23]:<24}{_figure(row.miou):>6}  {row.count:>7}" for row in lowest]
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped_by_reason.items())
            lines += ["", f"not counted: {len(self.skipped)} ({reasons})"]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Pair:
    row: InstanceIoU
    truth: Rle
    prediction: Rle


@dataclass(frozen=True, slots=True)
class _Crowd:
    image_id: JsonId
    category_id: JsonId
    region: Rle


class Evaluator:
    """Collects masks and their ground truth one by one; keeps run-length codes, never decoded masks.

    An annotation counts once (its id within its image). Rows without a usable ground truth, crowds and rows without a
    prediction are not counted, and `skipped` says so for each. Crowds still forgive detections in AP, as in COCO.

    Args:
        category_names: names by category id, in table order (`CocoFile.category_names`).
    """

    def __init__(self, category_names: Mapping[JsonId, str]) -> None:
        self.skipped: list[Skipped] = []
        self._names = dict(category_names)
        self._pairs: list[_Pair] = []
        self._crowds: list[_Crowd] = []
        self._frames: dict[JsonId, tuple[int, int]] = {}
        self._seen: set[tuple[JsonId | None, JsonId]] = set()
        self._iou_sum = 0.0

    @property
    def count(self) -> int:
        """Instances compared so far."""
        return len(self._pairs)

    @property
    def running_miou(self) -> float | None:
        """Mean IoU so far."""
        return self._iou_sum / len(self._pairs) if self._pairs else None

    def add(
        self,
        annotation: Annotation,
        prediction: Rle | None,
        score: float,
        *,
        image_hw: tuple[int, int] | None = None,
    ) -> None:
        """Compares one predicted mask with the `segmentation` of its annotation.

        Args:
            annotation: ground truth; polygons or run lengths in `annotation.raw["segmentation"]`.
            prediction: the mask in the whole image; None = none was made, which is skipped, not counted as wrong (an
                empty mask is an answer and counts).
            score: finite; what the labeler claims for the mask.
            image_hw: height and width of the image, needed only for crowds given as polygons, where no prediction
                says the size.
        """
        if not math.isfinite(score):
            raise ValueError(f"annotation {annotation.id!r}: score {score}; a finite number is needed")
        if annotation.reason is not None:
            self.skip(annotation, annotation.reason, annotation.problem or "")
            return
        annotation_id, image_id, category_id = annotation.id, annotation.image_id, annotation.category_id
        if annotation_id is None or image_id is None or category_id is None:
            self.skip(annotation, Reason.BAD_ID, "annotation, image and category need an id")
            return
        key = (image_id, annotation_id)
        if key in self._seen:
            self.skip(annotation, Reason.REPEATED, f"annotation {annotation.id!r}: given before; the first one counts")
            return
        self._seen.add(key)
        if annotation.iscrowd:
            self._add_crowd(annotation, image_id, category_id, image_hw)
            return
        if prediction is None:
            self.skip(annotation, Reason.NOT_ANSWERED, f"annotation {annotation.id!r}: no mask was made")
            return
        truth = self._truth(annotation, image_id, (prediction.height, prediction.width))
        if truth is None:
            return
        iou = rle.iou(truth, prediction)
        area, box = rle.area(truth), box_area(annotation.box_xywh)
        row = InstanceIoU(annotation_id, image_id, category_id, iou, float(score), area, box)
        self._iou_sum += iou
        self._pairs.append(_Pair(row, truth, prediction))

    @property
    def rows(self) -> list[InstanceIoU]:
        """What was compared so far, in order of arrival."""
        return [pair.row for pair in self._pairs]

    def rescore(self, scores: Iterable[float]) -> None:
        """Gives the compared masks other scores, in the order of `rows`."""
        self._pairs = [
            replace(pair, row=replace(pair.row, score=float(score)))
            for pair, score in zip(self._pairs, scores, strict=True)
        ]

    def skip(self, annotation: Annotation, reason: str, message: str) -> None:
        """Notes a row that cannot be counted, such as one whose image cannot be read."""
        self.skipped.append(Skipped(annotation.id, annotation.image_id, str(reason), message))

    def report(self, *, ap: bool = True) -> EvaluationReport:
        """The report over what was added so far, whatever the order it came in.

        Args:
            ap: also compute COCO's figures, by far the slowest part.
        """
        pairs = sorted(self._pairs, key=lambda pair: (id_order(pair.row.image_id), id_order(pair.row.annotation_id)))
        rows = [pair.row for pair in pairs]
        truth, results = self._as_coco(pairs) if ap else ({}, [])
        scores, ious = [row.score for row in rows], [row.iou for row in rows]
        return EvaluationReport(
            miou=mean_iou(rows),
            share_good=_mean(np.asarray(ious) > GOOD_IOU),
            empty_ground_truth=sum(row.area == 0 for row in rows),
            ap_at_1=coco_ap(truth, results, "one") if ap else {},
            ap_at_score=coco_ap(truth, results, "score") if ap else {},
            score=score_quality(scores, ious),
            categories=self._category_rows(rows),
            worst_first=tuple(sorted(rows, key=lambda row: row.iou)),
            skipped=tuple(self.skipped),
        )

    def _truth(self, annotation: Annotation, image_id: JsonId, frame: tuple[int, int]) -> Rle | None:
        """The ground-truth mask on the frame (height, width) of its prediction; None after noting why there is none."""
        name = f"annotation {annotation.id!r}"
        segmentation = annotation.raw.get("segmentation")
        known = self._frames.setdefault(image_id, frame)
        if known != frame:
            message = f"{name}: a mask of {frame[1]}x{frame[0]} px on an image of {known[1]}x{known[0]} px"
            self.skip(annotation, Reason.FRAME_MISMATCH, message)
        elif segmentation is None or segmentation == []:
            self.skip(annotation, Reason.NO_GROUND_TRUTH, f"{name}: has no segmentation")
        else:
            try:
                return rle.from_segmentation(segmentation, *frame, name)
            except BadDataset as fault:
                self.skip(annotation, Reason.BAD_GROUND_TRUTH, str(fault))
        return None

    def _add_crowd(
        self, annotation: Annotation, image_id: JsonId, category_id: JsonId, image_hw: tuple[int, int] | None
    ) -> None:
        message = f"annotation {annotation.id!r}: crowds are never counted"
        segmentation = annotation.raw.get("segmentation")
        try:
            if isinstance(segmentation, dict):
                self._crowds.append(_Crowd(image_id, category_id, Rle.from_coco(segmentation)))
            elif segmentation and image_hw is not None:
                self._crowds.append(_Crowd(image_id, category_id, rle.from_segmentation(segmentation, *image_hw)))
        except BadDataset as fault:
            message += f", and its region cannot be read ({fault})"
        self.skip(annotation, Reason.CROWD, message)

    def _as_coco(self, pairs: Sequence[_Pair]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        truth, results = [], []
        for number, pair in enumerate(pairs):
            where = {"image_id": pair.row.image_id, "category_id": pair.row.category_id}
            truth.append({**where, "id": number, "segmentation": pair.truth.to_coco(), "area": pair.row.area})
            results.append({**where, "segmentation": pair.prediction.to_coco(), "score": pair.row.score})
        for crowd in self._crowds:
            # A region of another frame than its image's masks cannot be laid over them.
            if self._frames.get(crowd.image_id) == (crowd.region.height, crowd.region.width):
                where = {"image_id": crowd.image_id, "category_id": crowd.category_id}
                truth.append({**where, "id": len(truth), "segmentation": crowd.region.to_coco(), "iscrowd": 1})
        images = [{"id": image_id} for image_id in self._frames]
        return {"images": images, "annotations": truth}, results

    def _category_rows(self, rows: Iterable[InstanceIoU]) -> tuple[CategoryRow, ...]:
        groups: dict[JsonId, list[InstanceIoU]] = {category_id: [] for category_id in self._names}
        for row in rows:
            groups.setdefault(row.category_id, []).append(row)
        return tuple(
            CategoryRow(
                category_id=category_id,
                name=self._names.get(category_id, str(category_id)),
                count=len(group),
                miou=float(np.mean([row.iou for row in group])),
                share_good=float(np.mean([row.iou > GOOD_IOU for row in group])),
                mean_score=float(np.mean([row.score for row in group])),
            )
            for category_id, group in groups.items()
            if group
        )


def evaluate_labels(truth: CocoFile, labels: CocoFile, *, ap: bool = True) -> EvaluationReport:
    """Compares a labelled file with the ground truth that has the same annotation ids.

    Labels that carry `error` or no readable mask are skipped with their reason; labels without a ground truth too.
    A label without `score` counts with score 1.
    """
    evaluator = Evaluator(truth.category_names)
    by_id = {label.id: label for label in labels.annotations if label.id is not None}
    for annotation in truth.annotations:
        label = by_id.pop(annotation.id, None) if annotation.id is not None else None
        image = truth.images.get(annotation.image_id) if annotation.image_id is not None else None
        size = image.size_wh if image is not None else None
        image_hw = (size[1], size[0]) if size is not None else None
        if annotation.problem is not None or annotation.iscrowd or label is None:
            evaluator.add(annotation, None, 0.0, image_hw=image_hw)
        else:
            _add_label(evaluator, annotation, label, image_hw)
    for label in by_id.values():
        evaluator.skip(label, Reason.NO_GROUND_TRUTH, f"annotation {label.id!r}: not in the ground-truth file")
    return evaluator.report(ap=ap)


def _add_label(
    evaluator: Evaluator, annotation: Annotation, label: Annotation, image_hw: tuple[int, int] | None
) -> None:
    name = f"annotation {label.id!r}"
    error, segmentation, score = (label.raw.get(key) for key in ("error", "segmentation", "score"))
    if error is not None or segmentation is None:
        reason = error.get("reason") if isinstance(error, dict) else None
        evaluator.skip(annotation, str(reason or Reason.NOT_ANSWERED), f"{name}: no mask was made")
        return
    score = 1.0 if score is None else score
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        evaluator.skip(annotation, Reason.NOT_ANSWERED, f"{name}: score {score!r}; a finite number is needed")
        return
    try:
        if image_hw is not None:
            mask = rle.from_segmentation(segmentation, *image_hw, name)
        else:
            mask = Rle.from_coco(segmentation, name)
    except BadDataset as fault:
        evaluator.skip(annotation, Reason.NOT_ANSWERED, str(fault))
        return
    evaluator.add(annotation, mask, float(score), image_hw=image_hw)


def mean_iou(rows: Sequence[InstanceIoU]) -> MiouResult:
    """IoU tables of instances; every figure is None where it has no instance."""
    ious = np.array([row.iou for row in rows], dtype=np.float64)
    classes = [row.category_id for row in rows]
    mask_size = size_class([row.area for row in rows])
    box_size = size_class([row.box_area for row in rows])
    return MiouResult(
        count=len(rows),
        overall=_mean(ious),
        by_size={name: _mean(ious[mask_size == k]) for k, name in enumerate(SIZE_NAMES)},
        count_by_size={name: int(np.count_nonzero(mask_size == k)) for k, name in enumerate(SIZE_NAMES)},
        class_mean=class_mean(classes, ious),
        class_mean_by_box_size={
            name: class_mean([c for c, size in zip(classes, box_size, strict=True) if size == k], ious[box_size == k])
            for k, name in enumerate(SIZE_NAMES)
        },
    )


def class_mean(category_ids: Sequence[JsonId], ious: ArrayLike) -> float | None:
    """Mean over classes of the mean IoU of each (§6.1, without its 1e-6 in the denominators); None without instances.

    >>> class_mean([1, 1, 2], [0.0, 1.0, 1.0])
    0.75
    """
    groups: dict[JsonId, list[float]] = {}
    for category_id, iou in zip(category_ids, np.asarray(ious, dtype=np.float64).tolist(), strict=True):
        groups.setdefault(category_id, []).append(iou)
    return _mean([float(np.mean(group)) for group in groups.values()])


def score_quality(scores: ArrayLike, ious: ArrayLike) -> ScoreQuality:
    """How far scores (N,) can be trusted to find the masks with a low IoU (N,)."""
    score, iou = np.asarray(scores, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    mean_score, miou = _mean(score), _mean(iou)
    return ScoreQuality(
        mean_score=mean_score,
        bias=None if mean_score is None or miou is None else mean_score - miou,
        calibration_error=calibration_error(score, iou),
        spearman=spearman(score, iou),
        bad_count=int(np.count_nonzero(iou < BAD_IOU)),
        bad_in_worst_fifth=bad_in_worst(score, iou < BAD_IOU, WORST_SHARE),
    )


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Rank correlation in [-1, 1], ties by mean rank; None for fewer than two values or a constant.

    >>> round(spearman([1, 2, 3, 4], [10, 20, 40, 30]), 6)
    0.8
    """
    first, second = _ranks(a), _ranks(b)
    if first.size < 2:
        return None
    first, second = first - first.mean(), second - second.mean()
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return min(max(float(first @ second) / norm, -1.0), 1.0) if norm > 0 else None


def calibration_error(scores: ArrayLike, ious: ArrayLike, bins: int = 10) -> float | None:
    """Expected calibration error: |mean score − mean IoU| per equal-width score bin over [0, 1], weighted by size.

    >>> round(calibration_error([0.9, 0.9], [0.5, 0.9]), 6)
    0.2
    """
    score, iou = np.asarray(scores, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    if score.size == 0:
        return None
    bin_of = np.clip((score * bins).astype(np.int64), 0, bins - 1)
    return float(np.abs(np.bincount(bin_of, weights=score - iou, minlength=bins)).sum() / score.size)


def bad_in_worst(scores: ArrayLike, is_bad: ArrayLike, share: float) -> float | None:
    """Share of the bad ones that lie in the worst-scored `share` of all; None when none is bad.

    Those tied at the border count by the part of them that fits, so that the answer does not depend on the order.

    >>> bad_in_worst([0.1, 0.2, 0.3, 0.4, 0.5], [True, False, True, False, False], 0.2)
    0.5
    """
    score, bad = np.asarray(scores, dtype=np.float64), np.asarray(is_bad, dtype=np.bool_)
    if not bad.any():
        return None
    _, group = np.unique(score, return_inverse=True)
    size, bad_of_group = np.bincount(group), np.bincount(group, weights=bad)
    before = np.cumsum(size) - size
    taken = np.clip((share * score.size - before) / size, 0.0, 1.0)
    return float((taken * bad_of_group).sum() / bad.sum())


def coco_ap(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], scores: Literal["one", "score"] = "score"
) -> Figures:
    """COCO's twelve mask figures by pycocotools, by the names of AP_NAMES; nothing is printed.

    Safe in several threads at once. Ids may be of any JSON type and are numbered anew in id order, which also keeps
    pycocotools from taking an annotation with id 0 for unmatched. Size classes follow the `area` of the ground truth
    as it stands, else its mask.

    Args:
        truth: a COCO object; images need width and height only where masks are polygons; iscrowd is honoured.
        results: COCO results: image_id, category_id, segmentation (run lengths or polygons) and score.
        scores: "one" sets every score to 1, so that the order of images and rows decides ties.

    Raises:
        BadDataset: a mask that is malformed, or a result for an image that the ground truth lacks.
    """
    images = {image["id"]: image for image in truth["images"]}
    image_numbers = {value: n for n, value in enumerate(sorted(images, key=id_order), start=1)}
    categories = sorted({row["category_id"] for row in truth["annotations"]}, key=id_order)
    category_numbers = {value: n for n, value in enumerate(categories, start=1)}

    def renumbered(row: Mapping[str, Any], number: int, what: str) -> dict[str, Any]:
        image_id = row["image_id"]
        if image_id not in images:
            raise BadDataset(f"{what} {number}: image_id {image_id!r} is not among the images of the ground truth")
        code = _code(row.get("segmentation"), images[image_id], f"{what} {number}")
        return {
            "id": number,
            "image_id": image_numbers[image_id],
            "category_id": category_numbers[row["category_id"]],
            "segmentation": code.to_coco(),
            "area": float(row["area"]) if what == "annotation" and "area" in row else float(rle.area(code)),
            "iscrowd": int(bool(row.get("iscrowd", 0))),
        }

    annotations = [renumbered(row, n, "annotation") for n, row in enumerate(truth["annotations"], start=1)]
    # A class without ground truth has no AP, so its detections cannot matter.
    wanted = [row for row in results if row["category_id"] in category_numbers]
    detections = [
        {**renumbered(row, n, "result"), "iscrowd": 0, "score": 1.0 if scores == "one" else float(row["score"])}
        for n, row in enumerate(wanted, start=1)
    ]
    if not annotations:
        return dict.fromkeys(AP_NAMES)
    frame = {
        # pycocotools reads the size although run lengths carry their own.
        "images": [{"id": n, "height": 0, "width": 0} for n in image_numbers.values()],
        "categories": [{"id": n} for n in category_numbers.values()],
    }
    evaluation = _silent("pycocotools.cocoeval").COCOeval(
        _indexed({**frame, "annotations": annotations}), _indexed({**frame, "annotations": detections}), "segm"
    )
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {
        name: None if value < 0 else value for name, value in zip(AP_NAMES, map(float, evaluation.stats), strict=True)
    }


def _indexed(dataset: dict[str, Any]) -> Any:
    coco = _silent("pycocotools.coco").COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _code(segmentation: Any, image: Mapping[str, Any], name: str) -> Rle:
    if isinstance(segmentation, dict):
        return Rle.from_coco(segmentation, name)
    if "height" not in image or "width" not in image:
        raise BadDataset(f"{name}: polygons need the width and height of image {image['id']!r}")
    return rle.from_segmentation(segmentation, image["height"], image["width"], name)


@cache
def _silent(name: str) -> ModuleType:
    """A private copy of a module whose `print` does nothing.

    Redirecting sys.stdout instead would swallow other threads' output, and two threads at once could lose it for good.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{name} is not installed; pip install pycocotools")
    module = importlib.util.module_from_spec(spec)
    module.print = lambda *_args, **_options: None  # type: ignore[attr-defined]
    spec.loader.exec_module(module)
    return module


def _ranks(values: ArrayLike) -> NDArray[np.float64]:
    _, group, size = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    mean_rank: NDArray[np.float64] = (np.cumsum(size) - (size - 1) / 2)[group]
    return mean_rank


def _mean(values: ArrayLike) -> float | None:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else None


def _figure(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.3f}"

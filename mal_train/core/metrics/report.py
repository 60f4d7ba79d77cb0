"""The result of an evaluation, whether it ran in this process or on a server: as an object, as JSON and as text.

Imports neither OpenCV nor pycocotools, so that a client can read results without loading them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mal_train.core.metrics.average_precision import AP_NAMES, LVIS_NAMES
from mal_train.core.metrics.miou import CocoMetrics, GroupMiou, InstanceIoU
from mal_train.core.metrics.score_quality import ScoreQuality
from mal_train.core.numbers import counted

if TYPE_CHECKING:
    from mal_train.core.coco.annotations import JsonId

GOOD_IOU = 0.75

CROWD = "CROWD"
"""The one reason to skip a row that is no failure: crowd regions are never measured."""

_EMPTY_GROUND_TRUTH = "EMPTY_GROUND_TRUTH"

_NO_GROUND_TRUTH = "NO_GROUND_TRUTH"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A ground-truth row that was not counted, with the reason."""

    annotation_id: JsonId | None
    image_id: JsonId | None
    reason: str
    message: str


def count_failures(skipped: Mapping[str, int]) -> int:
    """Returns the number of skipped rows that should have been measured.

    Args:
        skipped: numbers of rows by reason.
    """
    return sum(count for reason, count in skipped.items() if reason != CROWD)


def nothing_measured(skipped: Mapping[str, int]) -> str:
    """Returns a sentence on an evaluation that compared no mask, with the numbers of skipped rows by reason."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    remedy = "; give a file with true masks" if not skipped or _NO_GROUND_TRUTH in skipped else ""
    return f"nothing was measured: {reasons or 'no annotation has a mask'}{remedy}"


@dataclass(frozen=True)
class CategoryRow:
    """Row of the table of categories; means over the instances of one category."""

    category_id: JsonId
    name: str
    count: int
    miou: float
    share_good: float
    mean_score: float


class _ComparedInstance(Protocol):
    """A mask that was compared with its ground truth."""

    @property
    def annotation_id(self) -> JsonId: ...

    @property
    def image_id(self) -> JsonId: ...

    @property
    def iou(self) -> float: ...

    @property
    def score(self) -> float: ...


@dataclass(frozen=True)
class EvaluationMetrics:
    """The metrics of an evaluation.

    Attributes:
        images: measured images; None where they were not counted.
        overall: mean IoU over all instances.
        by_size: the same for small, medium and large ground-truth masks (COCO's bounds).
        class_miou: mean over categories of the mean IoU of each; None without instances.
        share_good: share of masks with IoU > 0.75; None without instances.
        ap_at_1: COCO's metrics with every score set to 1, images in id order (ties make AP depend on the order by
            ±0.004).
        ap_at_score: COCO's metrics with the scores of the masks. Both are {} when AP was not computed.
        lvis_at_1: LVIS's metrics with every score set to 1, by the names of LVIS_NAMES.
        lvis_at_score: the same with the scores of the masks. Both are {} unless the data set is federated, as LVIS is.
        score: how well the score finds bad masks.
        categories: in the order of the data set's list; only those with instances.
        skipped: number of ground-truth rows not counted, by reason, most frequent first.
        worst: instances with the lowest IoU, lowest first; all, or as many as were requested.
    """

    images: int | None
    overall: GroupMiou
    by_size: Mapping[str, GroupMiou]
    class_miou: float | None
    share_good: float | None
    ap_at_1: CocoMetrics
    ap_at_score: CocoMetrics
    lvis_at_1: CocoMetrics
    lvis_at_score: CocoMetrics
    score: ScoreQuality
    categories: tuple[CategoryRow, ...]
    skipped: Mapping[str, int]
    worst: Sequence[_ComparedInstance]

    @property
    def measured(self) -> int:
        """Number of masks that were compared; an evaluation without any has measured nothing."""
        return self.overall.count

    @property
    def empty_ground_truth(self) -> int:
        """Number of rows that were not measured since their ground-truth mask has no pixel."""
        return self.skipped.get(_EMPTY_GROUND_TRUTH, 0)

    @property
    def failed_count(self) -> int:
        """Number of rows that should have been measured and were not."""
        return count_failures(self.skipped)

    def to_dict(self, worst: int | None = 100) -> dict[str, Any]:
        """Returns the JSON form; lists the `worst` instances of lowest IoU (None = all that are known)."""
        return {
            "count": self.overall.count,
            "mIoU": self.overall.miou,
            "mIoU_by_size": {name: group.miou for name, group in self.by_size.items()},
            "count_by_size": {name: group.count for name, group in self.by_size.items()},
            "mIoU_class": self.class_miou,
            "share_IoU_above_0.75": self.share_good,
            "empty_ground_truth": self.empty_ground_truth,
            "AP@1": self.ap_at_1,
            "AP@score": self.ap_at_score,
            **({"LVIS@1": self.lvis_at_1, "LVIS@score": self.lvis_at_score} if self.lvis_at_1 else {}),
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
                for row in self.worst[:worst]
            ],
            "skipped_by_reason": dict(self.skipped),
        }

    @property
    def _bad_among_worst(self) -> str:
        fraction = self.score.bad_in_worst_fifth
        return "" if fraction is None else f"; the worst-scored 20 % hold {_text(fraction)} of them"

    def table(self, worst_categories: int = 10) -> str:
        """Returns the metrics as text for a terminal, with the categories of lowest mIoU."""
        if not self.measured:
            return nothing_measured(self.skipped)
        on_images = "" if self.images is None else f" on {counted(self.images, 'image')}"
        lines = [
            f"{counted(self.overall.count, 'mask')} compared{on_images}",
            "",
            f"{'mIoU':<12}{_text(self.overall.miou)}",
        ]
        lines += [f"  {name:<10}{_text(group.miou)}   {group.count:>7}" for name, group in self.by_size.items()]
        lines += [
            f"{'mIoU_class':<12}{_text(self.class_miou)}",
            f"{'IoU > 0.75':<12}{_text(self.share_good)}   of the masks",
        ]
        if self.ap_at_1:
            lines += ["", f"{'':<12}{'scores 1':>8}  {'scores':>8}"]
            lines += [f"{k:<12}{_text(self.ap_at_1[k]):>8}  {_text(self.ap_at_score[k]):>8}" for k in AP_NAMES]
        if self.lvis_at_1:
            lines += ["", f"{'LVIS':<12}{'scores 1':>8}  {'scores':>8}"]
            lines += [f"{k:<12}{_text(self.lvis_at_1[k]):>8}  {_text(self.lvis_at_score[k]):>8}" for k in LVIS_NAMES]
        lines += [
            "",
            f"score: mean {_text(self.score.mean_score)}, bias {_text(self.score.bias)}, calibration error "
            f"{_text(self.score.calibration_error)}, Spearman with IoU {_text(self.score.spearman)}",
            f"masks with IoU < 0.5: {self.score.bad_count}{self._bad_among_worst}",
        ]
        lowest = sorted(self.categories, key=lambda row: row.miou)[:worst_categories]
        if lowest:
            lines += ["", f"{'lowest categories':<24}{'mIoU':>6}  {'count':>7}"]
            lines += [f"{row.name[:23]:<24}{_text(row.miou):>6}  {row.count:>7}" for row in lowest]
        if self.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            lines += ["", f"not counted: {sum(self.skipped.values())} ({reasons})"]
        return "\n".join(lines)


@dataclass(frozen=True)
class EvaluationReport(EvaluationMetrics):
    """The result of an evaluation in this process: the metrics, with a row for each instance and each skipped row.

    Attributes:
        class_miou_by_box_size: `class_miou` within each size class by box area (the published mIoU_small …).
        skipped_rows: the rows behind `skipped`, in order of arrival.
        worst: every instance.
    """

    worst: Sequence[InstanceIoU]
    class_miou_by_box_size: CocoMetrics
    skipped_rows: tuple[Skipped, ...]

    def to_dict(self, worst: int | None = 100) -> dict[str, Any]:
        """Returns the JSON form; lists only the first `worst` instances and skipped rows (None = all)."""
        return {
            **super().to_dict(worst),
            "mIoU_class_by_box_size": self.class_miou_by_box_size,
            "skipped": [
                {
                    "annotation_id": row.annotation_id,
                    "image_id": row.image_id,
                    "reason": row.reason,
                    "message": row.message,
                }
                for row in self.skipped_rows[:worst]
            ],
        }


def _text(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.3f}"

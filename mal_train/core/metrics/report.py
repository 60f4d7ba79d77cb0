"""Everything an evaluation says, as an object, as JSON and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mal_train.core.coco.annotations import JsonId
from mal_train.core.metrics.coco_ap import AP_NAMES
from mal_train.core.metrics.miou import Figures, InstanceIoU, MiouResult
from mal_train.core.metrics.score_quality import ScoreQuality
from mal_train.core.settings import SIZE_NAMES

GOOD_IOU = 0.75


@dataclass(frozen=True, slots=True)
class Skipped:
    """A ground-truth row that was not counted, and why."""

    annotation_id: JsonId | None
    image_id: JsonId | None
    reason: str
    message: str


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
        figures = figures_json(
            by_size={name: (self.miou.count_by_size[name], self.miou.by_size[name]) for name in SIZE_NAMES},
            count=self.miou.count,
            miou=self.miou.overall,
            class_miou=self.miou.class_mean,
            share_good=self.share_good,
            empty_ground_truth=self.empty_ground_truth,
            ap_at_1=self.ap_at_1,
            ap_at_score=self.ap_at_score,
            score=self.score,
            categories=self.categories,
            worst_first=self.worst_first[:worst],
            skipped_by_reason=self.skipped_by_reason,
        )
        return {
            **figures,
            "mIoU_class_by_box_size": self.miou.class_mean_by_box_size,
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


class _Compared(Protocol):
    """A mask that was held against its ground truth."""

    @property
    def annotation_id(self) -> JsonId: ...

    @property
    def image_id(self) -> JsonId: ...

    @property
    def iou(self) -> float: ...

    @property
    def score(self) -> float: ...


def figures_json(
    *,
    count: int,
    miou: float | None,
    by_size: Mapping[str, tuple[int, float | None]],
    class_miou: float | None,
    share_good: float | None,
    empty_ground_truth: int,
    ap_at_1: Mapping[str, float | None],
    ap_at_score: Mapping[str, float | None],
    score: ScoreQuality,
    categories: Sequence[CategoryRow],
    worst_first: Sequence[_Compared],
    skipped_by_reason: Mapping[str, int],
) -> dict[str, Any]:
    """The JSON form of what every evaluation says, whoever made it; `by_size` is (masks, mIoU)."""
    return {
        "count": count,
        "mIoU": miou,
        "mIoU_by_size": {name: mean for name, (_, mean) in by_size.items()},
        "count_by_size": {name: masks for name, (masks, _) in by_size.items()},
        "mIoU_class": class_miou,
        "share_IoU_above_0.75": share_good,
        "empty_ground_truth": empty_ground_truth,
        "AP@1": ap_at_1,
        "AP@score": ap_at_score,
        "mean_score": score.mean_score,
        "score_bias": score.bias,
        "calibration_error": score.calibration_error,
        "spearman": score.spearman,
        "count_IoU_below_0.5": score.bad_count,
        "bad_in_worst_scored_fifth": score.bad_in_worst_fifth,
        "categories": [
            {
                "category_id": row.category_id,
                "name": row.name,
                "count": row.count,
                "mIoU": row.miou,
                "share_IoU_above_0.75": row.share_good,
                "mean_score": row.mean_score,
            }
            for row in categories
        ],
        "worst_first": [
            {"annotation_id": row.annotation_id, "image_id": row.image_id, "IoU": row.iou, "score": row.score}
            for row in worst_first
        ],
        "skipped_by_reason": skipped_by_reason,
    }


def _figure(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.3f}"

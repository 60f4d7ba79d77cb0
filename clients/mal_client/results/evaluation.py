"""What a server measured on a data set with true masks, as an object, as JSON and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mal_client.results.labels import BoxXywh, ModelRef
from mal_train.core.report.evaluation import Measured

if TYPE_CHECKING:
    from mal_train.core.metrics.report import CategoryRow
    from mal_train.core.metrics.score_quality import ScoreQuality

Figures = dict[str, float | None]
"""COCO's twelve figures by name (AP, AP50, AP75, APs …, as in mal_train.core.metrics.coco_ap); None where undefined."""


@dataclass(frozen=True)
class GroupMiou:
    """Mean IoU in [0, 1] of `count` instances; None of none."""

    count: int
    miou: float | None


@dataclass(frozen=True)
class MeasuredInstance:
    """One mask compared with its ground truth. Ids are those of the COCO file."""

    annotation_id: Any
    image_id: Any
    file_name: str
    box: BoxXywh
    iou: float
    score: float


@dataclass(frozen=True)
class Evaluation:
    """What the server measured on a data set; one part of a message each.

    Attributes:
        images: images that were measured.
        images_skipped: images left out as a whole, here or there; their objects are counted in `skipped`.
        overall: mean IoU over instances.
        by_size: the same for small, medium and large true masks (COCO's bounds).
        class_miou: mean over classes of class means; None when nothing was measured.
        share_good: share of masks with IoU > 0.75.
        empty_ground_truth: instances whose true mask is empty; they count with IoU 0.
        ap_at_1: COCO's figures with every score 1.
        ap_at_score: COCO's figures with the masks' own scores.
        score: what the score is worth for finding bad masks.
        categories: the classes that have instances.
        skipped: ground-truth objects that are not in the figures, by reason.
        worst: instances with the lowest IoU, lowest first; as many as were asked for.
        model: which weights were measured.
    """

    images: int
    images_skipped: int
    overall: GroupMiou
    by_size: dict[str, GroupMiou]
    class_miou: float | None
    share_good: float | None
    empty_ground_truth: int
    ap_at_1: Figures
    ap_at_score: Figures
    score: ScoreQuality
    categories: tuple[CategoryRow, ...]
    skipped: dict[str, int]
    worst: tuple[MeasuredInstance, ...]
    model: ModelRef

    @property
    def failed_count(self) -> int:
        """Objects that are not in the figures although they should be: all that was skipped but crowd regions."""
        return sum(count for reason, count in self.skipped.items() if reason != "CROWD")

    def to_dict(self, worst: int | None = 100) -> dict[str, Any]:
        """JSON form, named as `mal-train evaluate` does; the `worst` lowest instances are listed (None = all)."""
        # Imported late: it brings OpenCV and pycocotools, which callers who label single images need not wait for.
        from mal_train.core.metrics.report import figures_json  # noqa: PLC0415

        figures = figures_json(
            count=self.overall.count,
            miou=self.overall.miou,
            by_size={name: (group.count, group.miou) for name, group in self.by_size.items()},
            class_miou=self.class_miou,
            share_good=self.share_good,
            empty_ground_truth=self.empty_ground_truth,
            ap_at_1=self.ap_at_1,
            ap_at_score=self.ap_at_score,
            score=self.score,
            categories=self.categories,
            worst_first=self.worst[:worst],
            skipped_by_reason=self.skipped,
        )
        return {
            **figures,
            "images": self.images,
            "images_skipped": self.images_skipped,
            "model": {**asdict(self.model), "branch": str(self.model.branch)},
        }

    def measured(self) -> Measured:
        """The same for pages and terminals."""
        return Measured(
            count=self.overall.count,
            images=self.images,
            miou=self.overall.miou,
            by_size={name: (group.count, group.miou) for name, group in self.by_size.items()},
            class_miou=self.class_miou,
            share_good=self.share_good,
            ap_at_1=self.ap_at_1,
            ap_at_score=self.ap_at_score,
            score=self.score,
            categories=self.categories,
            skipped=self.skipped,
            pairs=[(row.score, row.iou) for row in self.worst],
        )

    def figures(self) -> list[tuple[str, str, str]]:
        """(name, figure, remark) of the main figures, for terminals and reports."""
        return self.measured().figures()

    def table(self) -> str:
        """The main figures as text for a terminal."""
        return "\n".join(f"{name:<14}{figure:>7}   {remark}".rstrip() for name, figure, remark in self.figures())

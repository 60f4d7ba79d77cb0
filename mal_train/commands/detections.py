"""COCO metrics of detected boxes and of the masks that were labeled for them, for `mal-train evaluate`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mal_train.core.coco.annotations import Annotation, CocoFile, Reason, row_name
from mal_train.core.coco.ground_truth import read_ground_truth
from mal_train.core.errors import BadGroundTruth
from mal_train.core.masks import rle
from mal_train.core.metrics.average_precision import AP_NAMES, LVIS_NAMES
from mal_train.core.metrics.coco_ap import ap_input, category_of
from mal_train.core.metrics.lvis import Federation
from mal_train.core.metrics.miou import CocoMetrics
from mal_train.core.metrics.overlaps import IouType
from mal_train.core.metrics.report import Skipped, count_failures, nothing_measured
from mal_train.core.numbers import finite_number
from mal_train.core.report.page import format_metric
from mal_train.kernel.labeler.types import Label
from mal_train.offline.dataset_labeler import LabelFailure

IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")


@dataclass(frozen=True)
class DetectionReport:
    """COCO metrics of detections, ranked by the detector's score.

    Attributes:
        count: detections with a mask. The metrics of the boxes include detections without one.
        truths: masks of the ground truth, without crowd regions.
        metrics: AP_bbox … ARl_bbox of the boxes, AP_segm … ARl_segm of the masks; None for a size class without
            instances.
        skipped_truths: ground truth that cannot be compared.
        skipped_detections: detections without a mask.
        lvis: LVIS's metrics AP_bbox … of boxes, AP_segm … of masks; {} unless the ground truth is federated.
    """

    count: int
    truths: int
    metrics: CocoMetrics
    skipped_truths: tuple[Skipped, ...]
    skipped_detections: tuple[Skipped, ...]
    lvis: CocoMetrics = field(default_factory=dict)

    @property
    def measured(self) -> int:
        """Number of masks that were compared with ground truth; without ground truth, none was."""
        return self.count if self.truths else 0

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped rows of both files by reason, most frequent first."""
        return dict(Counter(row.reason for row in (*self.skipped_truths, *self.skipped_detections)).most_common())

    @property
    def failed_count(self) -> int:
        """Number of rows that should have been measured and were not."""
        return count_failures(self.skipped)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON data."""
        lvis = {"LVIS": self.lvis} if self.lvis else {}
        return {"detections": self.count, **self.metrics, **lvis, "skipped_by_reason": self.skipped}

    def table(self) -> str:
        """Returns the metrics as a text table."""
        if not self.measured:
            return nothing_measured(self.skipped)
        lines = [f"{self.count} detections with a mask", "", f"{'':<12}{'boxes':>8}{'masks':>8}"]
        lines += _table(AP_NAMES, self.metrics)
        if self.lvis:
            lines += ["", f"{'LVIS':<12}{'boxes':>8}{'masks':>8}", *_table(LVIS_NAMES, self.lvis)]
        lines += ["", *(f"skipped: {count} {reason}" for reason, count in self.skipped.items())]
        return "\n".join(lines).rstrip()


def _table(names: Sequence[str], metrics: CocoMetrics) -> list[str]:
    return [
        f"{name:<12}" + "".join(f"{format_metric(metrics[f'{name}_{iou_type}']):>8}" for iou_type in IOU_TYPES)
        for name in names
    ]


def compare_detections(
    truth: CocoFile, detections: CocoFile, labels: Iterable[tuple[Annotation, Label | LabelFailure]]
) -> DetectionReport:
    """Computes the metrics of detections and of their masks.

    Ground truth without a readable mask is left out of both. A detection that could not be labeled counts for the boxes
    only; an invalid detection counts for neither. The report lists them with the reason.

    Args:
        truth: ground truth with masks.
        detections: detections, as `read_detections` returns them.
        labels: labels of the detections whose image is in the file.
    """
    truths_out: list[Skipped] = []
    rows = [row for annotation in truth.annotations if (row := _truth_row(truth, annotation, truths_out)) is not None]
    images = [{"id": image_id} for image_id in truth.images]
    results: list[dict[str, Any]] = []
    unknown = [row for row in detections.annotations if row.image_id is None or row.image_id not in truth.images]
    detections_out = [Skipped(row.id, row.image_id, str(row.reason), row.problem or "") for row in unknown]
    for annotation, label in labels:
        if isinstance(label, LabelFailure):
            detections_out.append(Skipped(annotation.id, annotation.image_id, label.reason, label.message))
        if annotation.problem is None:
            results.append(_result(annotation, label))
    masked = [row for row in results if "segmentation" in row]
    metrics: CocoMetrics = {}
    lvis: CocoMetrics = {}
    federation = Federation.of(truth)
    for iou_type in IOU_TYPES:
        detected = masked if iou_type == "segm" else results
        overlaps = ap_input({"images": images, "annotations": rows}, detected, iou_type, federation=federation)
        metrics |= {f"{name}_{iou_type}": value for name, value in overlaps.metrics().items()}
        if federation is not None:
            lvis |= {f"{name}_{iou_type}": value for name, value in overlaps.lvis_metrics().items()}
    truths = sum(not row["iscrowd"] for row in rows)
    return DetectionReport(len(masked), truths, metrics, tuple(truths_out), tuple(detections_out), lvis)


def _result(annotation: Annotation, label: Label | LabelFailure) -> dict[str, Any]:
    """Returns a detection as a row of COCO results, with its mask if it has one."""
    row = {
        "image_id": annotation.image_id,
        "category_id": category_of(annotation),
        "bbox": list(annotation.box_xywh),
        "score": float(annotation.raw["score"]),
    }
    return row if isinstance(label, LabelFailure) else {**row, "segmentation": label.rle}


def _truth_row(truth: CocoFile, annotation: Annotation, skipped: list[Skipped]) -> dict[str, Any] | None:
    """Returns an annotation in the form of COCO's evaluation; None, with an entry in `skipped`, if it is invalid."""

    def skip(reason: str, message: str) -> None:
        skipped.append(Skipped(annotation.id, annotation.image_id, str(reason), message))

    if annotation.problem is not None or annotation.image_id is None:
        skip(str(annotation.reason), annotation.problem or "")
        return None
    size = truth.images[annotation.image_id].size_wh
    try:
        code = read_ground_truth(annotation.raw, None if size is None else (size[1], size[0]), row_name(annotation.id))
    except BadGroundTruth as error:
        skip(Reason.CROWD if annotation.iscrowd else error.reason, str(error))
        return None
    area = finite_number(annotation.raw.get("area"))
    return {
        "image_id": annotation.image_id,
        "category_id": category_of(annotation),
        "bbox": list(annotation.box_xywh),
        "segmentation": code,
        "iscrowd": int(annotation.iscrowd),
        "area": float(rle.area(code)) if area is None else area,
    }

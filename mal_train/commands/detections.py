"""`mal-train evaluate` with a detector's boxes: what they and their masks are worth, as COCO counts it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mal_train.core.coco.annotations import Annotation, CocoFile, Reason
from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.metrics.average_precision import AP_NAMES
from mal_train.core.metrics.coco_ap import IouType, coco_ap
from mal_train.core.metrics.miou import CocoMetrics
from mal_train.core.metrics.report import Skipped
from mal_train.core.report.page import format_metric
from mal_train.kernel.labeler.labeler import Label
from mal_train.offline.dataset_labeler import LabelFailure

KINDS: tuple[IouType, ...] = ("bbox", "segm")


@dataclass(frozen=True)
class DetectionReport:
    """COCO's figures of detections; each counts with the detector's score.

    Attributes:
        count: detections that got a mask. Among the boxes, those without one count too.
        figures: AP_bbox … ARl_bbox of the boxes, AP_segm … ARl_segm of the masks in them; None where no instance
            speaks for one.
        skipped_rows: detections without a mask, and ground truth that cannot be compared.
    """

    count: int
    figures: CocoMetrics
    skipped_rows: tuple[Skipped, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        reasons = Counter(row.reason for row in self.skipped_rows)
        return {"detections": self.count, **self.figures, "skipped_by_reason": dict(reasons.most_common())}

    def table(self) -> str:
        """The figures for a terminal."""
        lines = [f"{self.count} detections with a mask", "", f"{'':<12}{'boxes':>8}{'masks':>8}"]
        for name in AP_NAMES:
            lines.append(
                f"{name:<12}" + "".join(f"{format_metric(self.figures[f'{name}_{kind}']):>8}" for kind in KINDS)
            )
        counts = Counter(row.reason for row in self.skipped_rows)
        lines += ["", *(f"not counted: {count} {reason}" for reason, count in counts.most_common())]
        return "\n".join(lines).rstrip()


def compare_detections(
    truth: CocoFile, detections: CocoFile, answers: Iterable[tuple[Annotation, Label | LabelFailure]]
) -> DetectionReport:
    """Figures of detections and of the masks made for them.

    A ground-truth row without a readable mask is left out of both kinds. A detection whose box could not be given a
    mask counts among the boxes alone; one that is no box takes no part. `skipped` says why.

    Args:
        truth: ground truth with masks.
        detections: as `read_detections` gives them.
        answers: what was made of those that name an image of the file.
    """
    skipped: list[Skipped] = []
    rows = [row for annotation in truth.annotations if (row := _truth_row(truth, annotation, skipped)) is not None]
    images = [{"id": image_id} for image_id in truth.images]
    results: list[dict[str, Any]] = []
    lost = [row for row in detections.annotations if row.image_id is None or row.image_id not in truth.images]
    skipped += [Skipped(row.id, row.image_id, str(row.reason), row.problem or "") for row in lost]
    for annotation, label in answers:
        if isinstance(label, LabelFailure):
            skipped.append(Skipped(annotation.id, annotation.image_id, label.reason, label.message))
        if annotation.problem is None:
            results.append(_result(annotation, label))
    masked = [row for row in results if "segmentation" in row]
    figures: CocoMetrics = {}
    for kind in KINDS:
        of_kind = masked if kind == "segm" else results
        found = coco_ap({"images": images, "annotations": rows}, of_kind, "score", kind)
        figures |= {f"{name}_{kind}": value for name, value in found.items()}
    return DetectionReport(len(masked), figures, tuple(skipped))


def _result(annotation: Annotation, label: Label | LabelFailure) -> dict[str, Any]:
    """A detection as a row of COCO's results; with its mask where it got one."""
    row = {
        "image_id": annotation.image_id,
        "category_id": annotation.category_id,
        "bbox": list(annotation.box_xywh),
        "score": float(annotation.raw["score"]),
    }
    return row if isinstance(label, LabelFailure) else {**row, "segmentation": label.rle}


def _truth_row(truth: CocoFile, annotation: Annotation, skipped: list[Skipped]) -> dict[str, Any] | None:
    """The row as COCO's evaluation takes it; None after noting why it cannot."""

    def skip(reason: str, message: str) -> None:
        skipped.append(Skipped(annotation.id, annotation.image_id, str(reason), message))

    if annotation.problem is not None or annotation.image_id is None:
        skip(str(annotation.reason), annotation.problem or "")
        return None
    segmentation = annotation.raw.get("segmentation")
    size = truth.images[annotation.image_id].size_wh
    name = f"annotation {annotation.id!r}"
    if not segmentation:
        skip(Reason.NO_GROUND_TRUTH, f"{name}: has no segmentation")
        return None
    try:
        if isinstance(segmentation, dict):
            code = rle.Rle.from_coco(segmentation, name)
        elif size is not None:
            code = rle.from_segmentation(segmentation, size[1], size[0], name)
        else:
            raise BadDataset(f"{name}: polygons need the width and height of their image in the file")
    except BadDataset as fault:
        skip(Reason.BAD_GROUND_TRUTH, str(fault))
        return None
    area = annotation.raw.get("area")
    return {
        "image_id": annotation.image_id,
        "category_id": annotation.category_id,
        "bbox": list(annotation.box_xywh),
        "segmentation": code,
        "iscrowd": int(annotation.iscrowd),
        "area": float(area) if isinstance(area, int | float) else float(rle.area(code)),
    }

"""Mean IoU of compared masks: over instances, by size, and over classes as the published code counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mal_train.core.coco.annotations import JsonId
from mal_train.core.settings import SIZE_NAMES, size_class

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


def mean_iou(rows: Sequence[InstanceIoU]) -> MiouResult:
    """IoU tables of instances; every figure is None where it has no instance."""
    ious = np.array([row.iou for row in rows], dtype=np.float64)
    classes = [row.category_id for row in rows]
    mask_size = size_class([row.area for row in rows])
    box_size = size_class([row.box_area for row in rows])
    return MiouResult(
        count=len(rows),
        overall=mean_or_none(ious),
        by_size={name: mean_or_none(ious[mask_size == k]) for k, name in enumerate(SIZE_NAMES)},
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
    return mean_or_none([float(np.mean(group)) for group in groups.values()])


def mean_or_none(values: ArrayLike) -> float | None:
    """Mean in float64; None of nothing.

    >>> mean_or_none([0.0, 1.0]), mean_or_none([])
    (0.5, None)
    """
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else None

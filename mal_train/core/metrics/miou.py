"""Mean IoU of compared masks: over instances, by size, and over categories as the published code counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from mal_train.core.size_class import SIZE_NAMES, size_class

if TYPE_CHECKING:
    from mal_train.core.coco.annotations import JsonId

CocoMetrics = dict[str, float | None]
"""Metrics by name; None where no instance defines one (pycocotools writes -1)."""


@dataclass(frozen=True, slots=True)
class InstanceIoU:
    """One compared mask.

    Attributes:
        annotation_id: id of the ground truth.
        image_id: id of its image.
        category_id: id of its category.
        iou: in [0, 1]; 0 when both masks are empty.
        score: score of the predicted mask.
        area: pixels of the ground-truth mask; decides the size class in tables and AP.
        box_area: in px²; decides the size class of the published metrics.
    """

    annotation_id: JsonId
    image_id: JsonId
    category_id: JsonId
    iou: float
    score: float
    area: int
    box_area: float


@dataclass(frozen=True, slots=True)
class GroupMiou:
    """Mean IoU in [0, 1] of `count` instances; None without instances."""

    count: int
    miou: float | None


@dataclass(frozen=True)
class MiouResult:
    """Mean IoU of instances.

    Attributes:
        overall: mean over instances.
        by_size: mean over the instances of each size class by ground-truth mask area.
        class_mean: mean over categories of the mean IoU of each (the published mIoU).
        class_mean_by_box_size: the same within each size class by box area (the published mIoU_small …, which the
            published code computes correctly only for a batch of one).
    """

    overall: GroupMiou
    by_size: dict[str, GroupMiou]
    class_mean: float | None
    class_mean_by_box_size: CocoMetrics


def mean_iou(rows: Sequence[InstanceIoU]) -> MiouResult:
    """Computes the mean IoU of instances, and of each size class and category."""
    ious = np.array([row.iou for row in rows], dtype=np.float64)
    categories = [row.category_id for row in rows]
    mask_size = size_class([row.area for row in rows])
    box_size = size_class([row.box_area for row in rows])
    return MiouResult(
        overall=_group(ious),
        by_size={name: _group(ious[mask_size == k]) for k, name in enumerate(SIZE_NAMES)},
        class_mean=class_mean(categories, ious),
        class_mean_by_box_size={
            name: class_mean(
                [c for c, size in zip(categories, box_size, strict=True) if size == k], ious[box_size == k]
            )
            for k, name in enumerate(SIZE_NAMES)
        },
    )


def class_mean(category_ids: Sequence[JsonId], ious: ArrayLike) -> float | None:
    """Computes the mean over categories of the mean IoU of each; None without instances.

    As §6.1 defines it, without its 1e-6 in the denominators.

    >>> class_mean([1, 1, 2], [0.0, 1.0, 1.0])
    0.75
    """
    groups: dict[JsonId, list[float]] = {}
    for category_id, iou in zip(category_ids, np.asarray(ious, dtype=np.float64).tolist(), strict=True):
        groups.setdefault(category_id, []).append(iou)
    return mean_or_none([float(np.mean(group)) for group in groups.values()])


def mean_or_none(values: ArrayLike) -> float | None:
    """Computes the mean in float64; None without values.

    >>> mean_or_none([0.0, 1.0]), mean_or_none([])
    (0.5, None)
    """
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size else None


def _group(ious: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> GroupMiou:
    return GroupMiou(int(ious.size), mean_or_none(ious))

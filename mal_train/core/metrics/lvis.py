"""LVIS AP: COCO's matching where only some categories are judged in each image (Gupta et al., CVPR 2019, section 3).

The ground truth is federated: of an image it is known which categories are present and which are absent, and of some
present ones not every object is annotated. The numbers are those of the package `lvis` 0.5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from mal_train.core.coco.annotations import CocoFile, ImageInfo, JsonId
from mal_train.core.metrics.average_precision import (
    AREAS,
    RECALLS,
    THRESHOLDS,
    Floats,
    Groups,
    accumulate,
    match_groups,
    mean_known,
)

MAX_DETS_PER_IMAGE: Final = 300
"""Detections of an image that count, highest score first."""

_FREQUENCIES: Final = ("r", "c", "f")


@dataclass(frozen=True)
class Federation:
    """The categories that are judged in each image of a federated dataset.

    Attributes:
        frequencies: "r", "c" or "f" by category id: in few, some or many images.
        negative: categories that are known to be absent, by image id.
        not_exhaustive: categories of which not every object is annotated, by image id.
    """

    frequencies: Mapping[JsonId, str] = field(default_factory=dict)
    negative: dict[JsonId, frozenset[JsonId]] = field(default_factory=dict)
    not_exhaustive: dict[JsonId, frozenset[JsonId]] = field(default_factory=dict)

    @classmethod
    def of(cls, coco: CocoFile) -> "Federation | None":
        """Returns what a file says; None unless it is federated, as the files of LVIS are."""
        if not any(image.is_federated for image in coco.images.values()):
            return None
        federation = cls(coco.category_frequencies)
        for image in coco.images.values():
            federation.add(image.id, image)
        return federation

    def add(self, image_id: JsonId, image: ImageInfo) -> None:
        """Adds what the row of an image says, under an id."""
        if image.negative_category_ids:
            self.negative[image_id] = frozenset(image.negative_category_ids)
        if image.not_exhaustive_category_ids:
            self.not_exhaustive[image_id] = frozenset(image.not_exhaustive_category_ids)

    def counted(
        self, truths: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """Returns the results that count, in their order: at most MAX_DETS_PER_IMAGE of an image, in judged categories.

        As in `lvis`, results of other categories take places among those of their image.
        """
        positive = {(row["image_id"], row["category_id"]) for row in truths}
        by_image: dict[JsonId, list[int]] = {}
        for index, row in enumerate(results):
            by_image.setdefault(row["image_id"], []).append(index)
        kept: set[int] = set()
        for indices in by_image.values():
            order = sorted(indices, key=lambda index: -float(results[index].get("score", 1.0)))
            kept.update(order[:MAX_DETS_PER_IMAGE])
        return [
            row
            for index, row in enumerate(results)
            if index in kept
            and (
                (row["image_id"], row["category_id"]) in positive
                or row["category_id"] in self.negative.get(row["image_id"], ())
            )
        ]


def lvis_summary(groups: Groups, scores: Floats, frequencies: Sequence[str]) -> tuple[float, ...]:
    """Computes LVIS's metrics in the order of `average_precision.LVIS_NAMES`; −1 where no ground truth defines one.

    Args:
        groups: detections and ground truths; without crowd regions, which LVIS does not have.
        scores: (D,) of the detections.
        frequencies: frequency of each category, by its index in the groups.
    """
    matched, spans = match_groups(groups, scores, MAX_DETS_PER_IMAGE)
    average_precision: list[float] = []
    by_frequency: list[float] = []
    average_recall: list[float] = []
    names = np.array([frequencies[groups.categories[span.groups.start]] for span in spans], dtype=np.str_)
    for area in range(len(AREAS)):
        precision = np.full((len(THRESHOLDS), len(RECALLS), len(spans)), -1.0)
        recall = np.full((len(THRESHOLDS), len(spans)), -1.0)
        for k, span in enumerate(spans):
            accumulate(matched, span, area, precision[:, :, k], {MAX_DETS_PER_IMAGE: recall[:, k]})
        average_precision.append(mean_known(precision))
        average_recall.append(mean_known(recall))
        if area == 0:
            average_precision += [mean_known(precision[0]), mean_known(precision[5])]
            by_frequency = [mean_known(precision[:, :, names == frequency]) for frequency in _FREQUENCIES]
    return (*average_precision, *by_frequency, *average_recall)

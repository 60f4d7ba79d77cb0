"""LVIS AP: COCO's matching where only some categories are judged in each image (Gupta et al., CVPR 2019, section 3).

The ground truth is federated: each image has categories that are known to be present, with all of their objects or some
of them annotated, and categories that are known to be absent. The numbers are those of the package `lvis` 0.5.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from mal_train.core.coco.annotations import CocoFile, ImageInfo, JsonId
from mal_train.core.coco.stream import CocoHead
from mal_train.core.metrics.average_precision import (
    AREAS,
    RECALLS,
    THRESHOLDS,
    Bools,
    Floats,
    Groups,
    accumulate,
    match_groups,
    mean_known,
)

MAX_DETS_PER_IMAGE: Final = 300
"""Detections of an image that count, highest score first; of equal scores, the first ones."""

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
    def of(cls, coco: CocoFile | CocoHead) -> "Federation | None":
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
        self, truths: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], *, by_score: bool
    ) -> Bools:
        """Returns True (results,) for the results that count: at most MAX_DETS_PER_IMAGE of an image, if judged there.

        As in `lvis`, results of other categories take places among those of their image.

        Args:
            truths: ground truth without crowd regions, which LVIS does not have.
            results: COCO results.
            by_score: the highest scores of an image count; otherwise its first results do, as with equal scores.
        """
        positive = {(row["image_id"], row["category_id"]) for row in truths}
        by_image: dict[JsonId, list[int]] = {}
        for index, row in enumerate(results):
            by_image.setdefault(row["image_id"], []).append(index)
        is_counted = np.zeros(len(results), dtype=np.bool_)
        for image_id, indices in by_image.items():
            if by_score:
                indices.sort(key=lambda index: -float(results[index].get("score", 1.0)))
            absent = self.negative.get(image_id, ())
            for index in indices[:MAX_DETS_PER_IMAGE]:
                category = results[index]["category_id"]
                is_counted[index] = (image_id, category) in positive or category in absent
        return is_counted


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

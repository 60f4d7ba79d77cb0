"""The result of an evaluation by a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mal_client.results.labels import BoxXywh, ModelRef
from mal_train.core.metrics.miou import CocoMetrics, GroupMiou
from mal_train.core.metrics.report import EvaluationMetrics, Skipped

__all__ = ["CocoMetrics", "Evaluation", "GroupMiou", "MeasuredInstance"]


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
class Evaluation(EvaluationMetrics):
    """The metrics that a server measured on a data set.

    Attributes:
        images: images that were measured.
        images_skipped: images that could not be read, by the client or by the server; `skipped` counts their objects.
        worst: instances with the lowest IoU, lowest first; at most `worst_count` of the call.
        model: the evaluated weights.
        skipped_rows: objects that this client did not send although they should have been measured, with the reason;
            the first 1000.
        skipped_messages: message of the first object that the server did not measure, by reason.
    """

    images: int
    worst: tuple[MeasuredInstance, ...]
    images_skipped: int
    model: ModelRef
    skipped_rows: tuple[Skipped, ...] = ()
    skipped_messages: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self, worst: int | None = 100) -> dict[str, Any]:
        """Returns the JSON form, with the keys of `mal-train evaluate`; lists the `worst` instances (None = all)."""
        return {
            **super().to_dict(worst),
            "images": self.images,
            "images_skipped": self.images_skipped,
            "model": {**asdict(self.model), "branch": str(self.model.branch)},
            "skipped": [asdict(row) for row in self.skipped_rows[:worst]],
            "skipped_on_server": dict(self.skipped_messages),
        }

"""Options, progress and result of a job on a COCO file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mal_client.errors import ItemError
from mal_client.results.labels import ModelRef
from mal_train.core.errors import ConfigError
from mal_train.core.settings import COCO_RULES, MaskFormat, RowFilter, RowRules, member_of

if TYPE_CHECKING:
    from mal_train.core.coco.annotations import JsonId

FAILED_LISTED = 1000
"""Limit of failed annotations in a result; the errors file lists all of them."""


@dataclass(frozen=True)
class DatasetOptions:
    """Selection of annotations, and the form in which they are written.

    Attributes:
        only: which annotations are labeled.
        ids: annotation ids for `RowFilter.IDS`.
        update_bbox: set the box of each labeled annotation to the tight box of its mask.
        restart: discard the results of an unfinished run instead of resuming it.
        mask_format: format of new masks; copied masks stay unchanged. POLYGONS: a hole is joined to its outline by a
            bridge of no width, and an empty mask stays run-length encoded, because COCO polygons have neither holes
            nor an empty form. PNG: a 1-bit file of the image's size in a folder beside the output, named in
            `mask_file`; `segmentation` stays run-length encoded, so that the file stays a COCO file.
        polygon_tolerance_px: greatest distance in px of a simplified polygon from the mask's edge; 0 keeps it exact.
        rules: how crowd regions and rotated boxes are read.
        boxes: COCO results list of a detector, whose rows take the place of the annotations; None: the annotations.

    Raises:
        ConfigError: an unknown filter or format; a tolerance that is negative, not finite or without POLYGONS; `ids`
            without `RowFilter.IDS` or the reverse; `boxes` with another filter than ALL.
    """

    only: RowFilter = RowFilter.ALL
    ids: frozenset[JsonId] = frozenset()
    update_bbox: bool = False
    restart: bool = False
    mask_format: MaskFormat = MaskFormat.RLE
    polygon_tolerance_px: float = 0.0
    rules: RowRules = COCO_RULES
    boxes: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "only", member_of(RowFilter, self.only, "--only (only=)"))
        object.__setattr__(self, "mask_format", member_of(MaskFormat, self.mask_format, "--format (mask_format=)"))
        tolerance = f"--polygon-tolerance (polygon_tolerance_px=): {self.polygon_tolerance_px}"
        only = f"--only {self.only} (only=)"
        if not 0.0 <= self.polygon_tolerance_px < math.inf:
            raise ConfigError(f"{tolerance}; it must be 0 or more pixels")
        if self.polygon_tolerance_px and self.mask_format is not MaskFormat.POLYGONS:
            raise ConfigError(
                f"{tolerance} with --format {self.mask_format} (mask_format=); it needs {MaskFormat.POLYGONS}"
            )
        if self.boxes is not None and self.only is not RowFilter.ALL:
            raise ConfigError(f"--boxes (boxes=): {self.boxes} with {only}; all boxes of a detector are labeled")
        if (self.only is RowFilter.IDS) != bool(self.ids):
            raise ConfigError(
                f"--ids (ids=): {len(self.ids)} with {only}; give IDs and --only {RowFilter.IDS} together"
            )


DEFAULT_DATASET_OPTIONS = DatasetOptions()
"""Labels every annotation and replaces existing masks."""


@dataclass(frozen=True)
class Progress:
    """Progress of a job. Failed images and boxes count as done.

    Attributes:
        images_done: by this run and by the unfinished one before it.
        images_total: of the job.
        boxes_done: by both runs, with the failed ones.
        boxes_failed: of `boxes_done`.
        running_miou: mean IoU of an evaluation so far, in [0, 1]; None for other jobs.
        images_before: those of `images_done` that an unfinished run had done; they say nothing about this run's rate.
    """

    images_done: int
    images_total: int
    boxes_done: int
    boxes_failed: int
    running_miou: float | None = None
    images_before: int = 0


@dataclass(frozen=True)
class FailedAnnotation:
    """An annotation that failed. `annotation_id` and `image_id` are those of the COCO file, of any JSON type."""

    annotation_id: Any
    image_id: Any
    file_name: str | None
    error: ItemError

    def to_dict(self) -> dict[str, Any]:
        """Returns the annotation as a line of the errors file."""
        return {
            "annotation_id": self.annotation_id,
            "image_id": self.image_id,
            "file_name": self.file_name,
            "code": self.error.code,
            "reason": self.error.reason,
            "message": self.error.message,
        }


@dataclass(frozen=True)
class DatasetResult:
    """Result of a labeling job.

    Attributes:
        output: the COCO file with masks; for a shard, its journal.
        errors_file: one JSON line for each failed annotation; None when there are none.
        labeled: number of annotations with a mask, from this run and from the unfinished one before it.
        copied: number of annotations that were not to be labeled (crowd regions, or not selected).
        failed: the first `FAILED_LISTED` annotations that failed; the errors file lists all.
        model: the weights that answered.
        failed_count: number of annotations that failed.
        is_final: False when the server was lost; the same job started again labels what is missing.
        masks_dir: folder of the PNG masks; None for other formats.
        crowds: those of `copied` that are crowd regions.
        flags: number of labeled annotations by flag, most frequent first; empty for a shard.
    """

    output: Path
    errors_file: Path | None
    labeled: int
    copied: int
    failed: tuple[FailedAnnotation, ...] = field(default=())
    model: ModelRef | None = None
    failed_count: int = 0
    is_final: bool = True
    masks_dir: Path | None = None
    crowds: int = 0
    flags: Mapping[str, int] = field(default_factory=dict)

    @property
    def labels_nothing_but_crowds(self) -> bool:
        """Every annotation that was to be labeled is a crowd region, so none was labeled."""
        return bool(self.crowds) and self.crowds == self.copied and not self.labeled and not self.failed_count

    @property
    def is_empty(self) -> bool:
        """The run is complete and had no annotation: none was labeled or copied, and none failed."""
        return self.is_final and not (self.labeled or self.copied or self.failed_count)

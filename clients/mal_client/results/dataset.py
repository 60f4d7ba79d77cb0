"""Jobs on whole COCO files: what of the file is asked for, how far a job is, what it left behind."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mal_client.errors import ItemError
from mal_client.results.labels import ModelRef
from mal_train.core.errors import ConfigError
from mal_train.core.settings import MaskFormat

if TYPE_CHECKING:
    from mal_train.core.coco.annotations import JsonId

FAILED_LISTED = 1000
"""Failed annotations that a result holds; a million of them would fill the memory."""


class RowFilter(StrEnum):
    """Which annotations of a file are labeled; the others are copied as they are."""

    ALL = "all"
    """Every one; masks that the input holds stay in the input alone."""
    MISSING = "missing"
    """Those without a mask, and those that failed before."""
    FLAGGED = "flagged"
    """Those that an earlier run flagged, and those that failed before."""
    IDS = "ids"
    """Those of `DatasetOptions.ids`."""


@dataclass(frozen=True)
class DatasetOptions:
    """What of a COCO file is labeled and how it is written.

    Attributes:
        only: which annotations.
        ids: their ids, for `RowFilter.IDS`.
        update_bbox: also set the box of each labeled annotation to the tight box of its mask.
        restart: throw away the answers of an unfinished run instead of going on from them.
        mask_format: how masks are written; masks that are kept stay as they are. POLYGONS: a hole is joined to its
            outline by a bridge of no width, and an empty mask stays a run-length code, since COCO's polygons have
            neither holes nor emptiness. PNG: 1-bit files of the image's size in a folder beside the output, named by
            `mask_file`; `segmentation` stays a run-length code, so that the file stays a COCO file.
        polygon_tolerance_px: how far polygons may run beside the mask's edge, to have fewer points; 0 = exact.
    """

    only: RowFilter = RowFilter.ALL
    ids: frozenset[JsonId] = frozenset()
    update_bbox: bool = False
    restart: bool = False
    mask_format: MaskFormat = MaskFormat.RLE
    polygon_tolerance_px: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.polygon_tolerance_px < math.inf:
            raise ConfigError(f"polygon_tolerance_px: {self.polygon_tolerance_px}; it must be 0 px or more")
        if self.polygon_tolerance_px and self.mask_format is not MaskFormat.POLYGONS:
            raise ConfigError(f"polygon_tolerance_px: has no meaning for masks as {self.mask_format}; choose polygons")
        if (self.only is RowFilter.IDS) != bool(self.ids):
            raise ConfigError(f"ids: {len(self.ids)} given with only={self.only}; the two belong together")


DEFAULT_DATASET_OPTIONS = DatasetOptions()
"""Every annotation, made anew."""


@dataclass(frozen=True)
class Progress:
    """How far a bulk job is; images and boxes that could not be answered count as done.

    Attributes:
        images_done: of this run and of the unfinished one before it.
        images_total: of the job.
        boxes_done: with those that failed.
        boxes_failed: could not be answered.
        running_miou: of an evaluation, so far.
        images_before: how many of `images_done` an unfinished run had left: they say nothing of this one's speed.
    """

    images_done: int
    images_total: int
    boxes_done: int
    boxes_failed: int
    running_miou: float | None = None
    images_before: int = 0


@dataclass(frozen=True)
class FailedAnnotation:
    """An annotation without an answer. `annotation_id` and `image_id` are those of the COCO file, of any JSON type."""

    annotation_id: Any
    image_id: Any
    file_name: str | None
    error: ItemError

    def to_dict(self) -> dict[str, Any]:
        """One line of the errors file."""
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
    """What a labeling job left behind.

    Attributes:
        output: the COCO file with masks.
        errors_file: one JSON line for each failed annotation; None when there are none.
        labeled: annotations that got a mask, in this run or in the unfinished one before it.
        copied: annotations copied through unlabeled on purpose (crowd regions, or masks that were kept).
        failed: the first FAILED_LISTED annotations that could not be answered; the errors file lists all.
        model: which weights answered.
        failed_count: how many could not be answered.
        is_final: False when the server was lost: the same job run again goes on with what is missing.
        masks_dir: folder of the PNG masks, where those were asked for.
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

"""Ranks the masks of a labeled file for review, worst first. Needs no server.

Failed annotations come first, then masks by ascending score or agreement. With ground truth, both orders are measured:
how well they find bad masks.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mal_client.images.image_files import ImageFiles
from mal_client.types import BoxXywh
from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId, Reason, row_name
from mal_train.core.coco.ground_truth import read_ground_truth
from mal_train.core.coco.left_out import LeftOut
from mal_train.core.coco.output import mask_score_of, write_json_atomic
from mal_train.core.coco.stream import CocoHead, read_list, scan_coco
from mal_train.core.errors import BadDataset, BadGroundTruth, ConfigError
from mal_train.core.images.header import read_header
from mal_train.core.masks.flags import FLAG_DESCRIPTIONS
from mal_train.core.masks.rle import Rle, from_segmentation, iou, to_box
from mal_train.core.metrics.score_quality import bad_in_worst, spearman
from mal_train.core.numbers import counted, finite_number
from mal_train.core.report.page import format_metric
from mal_train.core.settings import LABELED
from mal_train.core.storage.addresses import Location

BAD_IOU: Final = 0.5
"""Masks below this IoU are bad: COCO's AP50 would count them as false positives."""

NO_MASK: Final = -1.0
"""Sort key of an annotation without a mask; precedes every other key."""

_NOT_XML: Final = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")

LISTED: Final = 5
"""Worst annotations that `ReviewQueue.lines` lists."""

FLAG_MEANINGS: Final[Mapping[str, str]] = {
    **{str(flag): text for flag, text in FLAG_DESCRIPTIONS.items()},
    "CROWD": "a crowd region, copied without labeling",
}
"""Descriptions of the flags of a labeled file."""


class SortBy(StrEnum):
    """Value that ranks the annotations, lowest first."""

    SCORE = "score"
    AGREEMENT = "agreement"


@dataclass(frozen=True)
class QueueItem:
    """One annotation to review.

    Attributes:
        rank: position in the queue, from 1.
        row: the annotation as in the labeled file.
        image: its image.
        box: x, y, w, h in px.
        key: value that ranks the annotation; NO_MASK without a mask.
        rle: the mask; None if it is missing or cannot be read.
        truth: the true mask; None if unknown.
        iou: IoU of the mask and the true mask; None if either is None.
    """

    rank: int
    row: Mapping[str, Any]
    image: ImageInfo
    box: BoxXywh
    key: float
    rle: Rle | None
    truth: Rle | None = None
    iou: float | None = None

    @property
    def reasons(self) -> list[str]:
        """Returns the message of its error, or the descriptions of its flags."""
        error = self.row.get("error")
        if error is not None:
            return [str(error.get("message", error) if isinstance(error, dict) else error)]
        flags = self.row.get("flags")
        return [FLAG_MEANINGS.get(str(flag), str(flag)) for flag in flags] if isinstance(flags, list) else []

    def with_tight_box(self) -> QueueItem:
        """Returns the item with the tight box of its mask; with its own box if there is no mask."""
        box = None if self.rle is None else to_box(self.rle)
        return self if box is None else replace(self, box=box)

    def line(self, sort_by: SortBy) -> str:
        """Returns one line of text with the ID, the image, the key and the reasons."""
        key = "no mask" if self.key == NO_MASK else f"{sort_by} {self.key:.2f}"
        reasons = "".join(f"; {reason}" for reason in self.reasons)
        return f"annotation {json.dumps(self.row.get('id'))}, {self.image.file_name or 'no image'}: {key}{reasons}"


@dataclass(frozen=True)
class OrderQuality:
    """Quality of an order, measured against ground truth.

    Attributes:
        sort_by: the order.
        count: masks compared.
        bad_count: masks with an IoU below BAD_IOU.
        spearman: rank correlation of key and IoU; None if one of them is constant.
        bad_in_worst_tenth: fraction of the bad masks among the first 10 % of the order; 0.1 for a random order.
        bad_in_worst_fifth: the same for 20 %.
    """

    sort_by: SortBy
    count: int
    bad_count: int
    spearman: float | None
    bad_in_worst_tenth: float | None
    bad_in_worst_fifth: float | None

    def line(self) -> str:
        """Returns the quality as one line of text."""
        text = (
            f"order by {self.sort_by}: Spearman {format_metric(self.spearman)} with IoU on "
            f"{counted(self.count, 'mask')}; "
        )
        if not self.bad_count:
            return f"{text}none has IoU < {BAD_IOU:g}"
        tenth, fifth = format_metric(self.bad_in_worst_tenth), format_metric(self.bad_in_worst_fifth)
        return (
            f"{text}IoU < {BAD_IOU:g}: {self.bad_count}, of which a share of {tenth} is in the worst 10 % and "
            f"{fifth} in the worst 20 %"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the quality as a JSON object."""
        fields = vars(self).copy()
        return {"by": str(fields.pop("sort_by")), **fields}


@dataclass
class ReviewQueue:
    """Review queue of a labeled file.

    Attributes:
        sort_by: value that ranks the annotations.
        masks: annotations with a mask and a key.
        failed: annotations without a mask, which come first.
        omitted: crowd regions, and annotations without a key (masks that were copied).
        flags: annotations by flag.
        worst: the first annotations of the order.
        qualities: quality of each order that the file supports; empty without ground truth.
        not_compared: annotations with a key that have no usable mask in the labeled file or in the ground truth.
    """

    sort_by: SortBy
    masks: int = 0
    failed: int = 0
    omitted: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    worst: list[QueueItem] = field(default_factory=list)
    qualities: list[OrderQuality] = field(default_factory=list)
    not_compared: LeftOut = field(default_factory=LeftOut)

    def to_dict(self) -> dict[str, Any]:
        """Returns the queue as a JSON object."""
        return {
            "by": str(self.sort_by),
            "masks": self.masks,
            "failed": self.failed,
            "left_out": self.omitted,
            "flags": dict(self.flags),
            "orders": [quality.to_dict() for quality in self.qualities],
            "not_compared": dict(self.not_compared.counts),
            "worst": [
                {
                    "rank": item.rank,
                    "annotation_id": item.row.get("id"),
                    "image_id": item.row.get("image_id"),
                    "file_name": item.image.file_name,
                    "score": mask_score_of(item.row),
                    "agreement": item.row.get("agreement"),
                    "IoU": item.iou,
                    "reasons": item.reasons,
                }
                for item in self.worst
            ],
        }

    def lines(self) -> list[str]:
        """Returns the counts, the flags, the qualities and the first LISTED annotations as lines of text."""
        lines = [
            f"{self.masks} masks, {self.failed} without a mask, {self.omitted} omitted; worst first by {self.sort_by}"
        ]
        lines += [f"{count:>8}  {flag:<16}{FLAG_MEANINGS.get(flag, '')}" for flag, count in self.flags.most_common()]
        lines += [quality.line() for quality in self.qualities]
        if self.worst:
            lines.append("worst:")
        return lines + [f"  {item.rank}. {item.line(self.sort_by)}" for item in self.worst[:LISTED]]


def review_queue(
    labeled_json: Location, *, sort_by: SortBy = SortBy.SCORE, count: int = 100, truth: Location | None = None
) -> ReviewQueue:
    """Ranks the annotations of a labeled file; reads it twice and holds only the `count` worst rows in memory.

    Args:
        labeled_json: a file that `mal-client label` wrote.
        sort_by: value that ranks the annotations.
        count: number of worst annotations to keep.
        truth: a COCO file with the true masks of the same annotation IDs.

    Raises:
        BadDataset: a file cannot be used.
        ConfigError: no annotation has the value to rank by, or none has a true mask in `truth`.
    """
    sizes = {
        row["id"]: (row["height"], row["width"])
        for row in read_list(labeled_json, "images")
        if isinstance(row, dict) and isinstance(row.get("id"), JsonId) and {"width", "height"} <= row.keys()
    }
    keys = _SortKeys(ReviewQueue(sort_by), None if truth is None else _Truth(truth), sizes)
    head = scan_coco(labeled_json, keys.add, rules=LABELED)
    queue = keys.queue
    if not queue.masks and not queue.failed:
        remedy = "label it with --agreement" if sort_by is SortBy.AGREEMENT else "label it first"
        raise ConfigError(f"{labeled_json}: no annotation has the field {str(sort_by)!r}; {remedy}")
    ranks = {int(index): rank for rank, index in enumerate(keys.worst(count), start=1)}
    items: dict[int, QueueItem] = {}

    def keep(index: int, row: Annotation) -> None:
        if index in ranks:
            items[ranks[index]] = keys.item(ranks[index], index, row, head)

    scan_coco(labeled_json, keep, rules=LABELED)
    queue.worst = [items[rank] for rank in sorted(items)]
    queue.qualities = keys.qualities()
    if truth is not None and queue.masks and not queue.qualities:
        raise ConfigError(
            f"{truth}: contains no mask for an annotation ID and image of {labeled_json} "
            f"({queue.not_compared.summary()}); give the file with the true masks of these annotations, or omit it. "
            f"The first: {queue.not_compared.examples()[0]}"
        )
    return queue


def write_worst(queue: ReviewQueue, labeled_json: Location, output: Path) -> None:
    """Writes the worst annotations as a COCO file, in their order.

    Each row gets a `review_rank`. The file lists only images that have a row.
    """
    images = {item.image.id for item in queue.worst}
    write_json_atomic(
        output,
        {
            "images": [row for row in read_list(labeled_json, "images") if _has_id(row, images)],
            "annotations": [{**item.row, "review_rank": item.rank} for item in queue.worst],
            "categories": list(read_list(labeled_json, "categories")),
        },
    )


def by_image(items: Sequence[QueueItem]) -> dict[str, list[QueueItem]]:
    """Groups items by the file name of their image, in the order of the queue; omits items without an image."""
    groups: dict[str, list[QueueItem]] = {}
    for item in items:
        if item.image.file_name:
            groups.setdefault(item.image.file_name, []).append(item)
    return groups


def frame_size(item: QueueItem, files: ImageFiles) -> tuple[int, int]:
    """Returns the width and height in px of an item's image, from its row or else from the header of its file.

    Raises:
        BadImage: the row has no size and the file cannot be read.
    """
    if item.image.size_wh is not None:
        return item.image.size_wh
    return read_header(files.read(item.image.file_name), item.image.file_name).size_wh


def category_names(labeled_json: Location) -> dict[object, str]:
    """Returns the category names of a file by ID."""
    rows = (row for row in read_list(labeled_json, "categories") if isinstance(row, dict))
    return {row.get("id"): str(row.get("name", row.get("id"))) for row in rows}


def xml_text(text: str) -> str:
    r"""Returns text with an escape for each character that XML cannot hold, such as a control character.

    >>> print(xml_text("a\x1bb"), xml_text("é"))
    a\x1bb é
    """
    return _NOT_XML.sub(lambda found: ascii(found[0])[1:-1], text)


class _Truth:
    """Rows with true masks by annotation ID; their masks stay encoded."""

    def __init__(self, path: Location) -> None:
        self._rows: dict[JsonId, Annotation] = {}
        scan_coco(path, self._add, rules=LABELED)

    def mask(self, row: Annotation, rle: Rle) -> Rle:
        """Returns the true mask of a labeled row.

        Args:
            row: the labeled row.
            rle: its mask, which states the size of the image.

        Raises:
            BadGroundTruth: the file has no mask for it that can be compared.
        """
        name = row_name(row.id)
        truth = None if row.id is None else self._rows.get(row.id)
        if truth is None:
            raise BadGroundTruth(f"{name}: the file has no annotation of this ID", Reason.NO_GROUND_TRUTH)
        if truth.image_id != row.image_id:
            images = f"{json.dumps(row.image_id)} in the labeled file, {json.dumps(truth.image_id)} here"
            raise BadGroundTruth(f"{name}: its image_id is {images}", Reason.NO_GROUND_TRUTH)
        if truth.problem is not None:
            raise BadGroundTruth(truth.problem, truth.reason or Reason.BAD_GROUND_TRUTH)
        if truth.iscrowd:
            raise BadGroundTruth(f"{name}: a crowd region (iscrowd 1)", Reason.CROWD)
        return read_ground_truth(truth.raw, (rle.height, rle.width), name)

    def _add(self, _: int, row: Annotation) -> None:
        if row.id is not None:
            # The other fields of the row would stay in memory.
            self._rows[row.id] = replace(row, raw={"segmentation": row.raw.get("segmentation")})


class _SortKeys:
    """Sort keys of all annotations of a file; takes 8 bytes per row."""

    def __init__(self, queue: ReviewQueue, truth: _Truth | None, sizes: Mapping[Any, tuple[Any, Any]]) -> None:
        self.queue = queue
        self._sizes = sizes
        self._truth = truth
        self._keys = array("d")
        self._comparisons: dict[SortBy, tuple[list[float], list[float]]] = {sort_by: ([], []) for sort_by in SortBy}

    def add(self, _: int, row: Annotation) -> None:
        """Adds one annotation."""
        flags = row.raw.get("flags")
        if isinstance(flags, list):
            self.queue.flags.update(str(flag) for flag in flags)
        key = _key(row, self.queue.sort_by)
        self._keys.append(np.nan if key is None else key)
        if key is None:
            self.queue.omitted += 1
        elif key == NO_MASK:
            self.queue.failed += 1
        else:
            self.queue.masks += 1
            if self._truth is not None:
                self._compare(row, self._truth)

    def worst(self, count: int) -> NDArray[np.int64]:
        """Returns the indices of the first `count` annotations of the queue."""
        keys = np.frombuffer(self._keys, dtype=np.float64)
        # NaN sorts last. Stable: rows with equal keys keep the order of the file.
        order = np.argsort(keys, kind="stable")
        return order[: min(count, int(np.count_nonzero(~np.isnan(keys))))]

    def item(self, rank: int, index: int, row: Annotation, head: CocoHead) -> QueueItem:
        """Builds the queue item of the annotation at an index of the file."""
        image = None if row.image_id is None else head.images.get(row.image_id)
        if image is None:
            image = ImageInfo("", "", None, None, "its image is not in the file")
        rle = self._mask(row)
        truth: Rle | None = None
        if rle is not None and self._truth is not None:
            with suppress(BadGroundTruth):
                truth = self._truth.mask(row, rle)
        mask_iou = None if rle is None or truth is None else iou(rle, truth)
        return QueueItem(rank, row.raw, image, row.box_xywh, self._keys[index], rle, truth, mask_iou)

    def qualities(self) -> list[OrderQuality]:
        """Measures each order against ground truth."""
        return [
            OrderQuality(
                sort_by=sort_by,
                count=len(ious),
                bad_count=int(np.count_nonzero(np.asarray(ious) < BAD_IOU)),
                spearman=spearman(keys, ious),
                bad_in_worst_tenth=bad_in_worst(keys, np.asarray(ious) < BAD_IOU, 0.1),
                bad_in_worst_fifth=bad_in_worst(keys, np.asarray(ious) < BAD_IOU, 0.2),
            )
            for sort_by, (keys, ious) in self._comparisons.items()
            if ious
        ]

    def _mask(self, row: Annotation) -> Rle | None:
        return _mask(row, self._sizes.get(row.image_id))

    def _compare(self, row: Annotation, truth: _Truth) -> None:
        rle = self._mask(row)
        if rle is None:
            message = f"{row_name(row.id)}: no mask in the labeled file that can be read"
            self.queue.not_compared.add("NO_MASK", message, row.id)
            return
        try:
            mask_iou = iou(rle, truth.mask(row, rle))
        except BadGroundTruth as error:
            self.queue.not_compared.add(error.reason, str(error), row.id)
            return
        for sort_by, (keys, ious) in self._comparisons.items():
            key = _key(row, sort_by)
            if key is not None:
                keys.append(key)
                ious.append(mask_iou)


def _key(row: Annotation, sort_by: SortBy) -> float | None:
    """Returns the score or agreement of a row; NO_MASK if its labeling failed.

    Returns None for rows that the queue omits: crowd regions, and rows without the number.
    """
    if row.iscrowd:
        return None
    if "error" in row.raw:
        return NO_MASK
    return finite_number(mask_score_of(row.raw) if sort_by is SortBy.SCORE else row.raw.get(str(sort_by)))


def _mask(row: Annotation, size_hw: tuple[Any, Any] | None) -> Rle | None:
    """Returns the mask of a row, from run lengths or polygons; None if it is missing or cannot be read."""
    segmentation = row.raw.get("segmentation")
    if "error" in row.raw or not segmentation:
        return None
    try:
        if isinstance(segmentation, dict):
            return Rle.from_coco(segmentation)
        return None if size_hw is None else from_segmentation(segmentation, *size_hw)
    except BadDataset:
        return None


def _has_id(row: Any, ids: set[JsonId]) -> bool:
    return isinstance(row, dict) and isinstance(row.get("id"), JsonId) and row["id"] in ids

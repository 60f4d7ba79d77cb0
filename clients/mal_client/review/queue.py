"""Which masks of a labeled file to look at first, why, and how well that order finds bad ones. Needs no server.

Worst first by score: failed annotations, then the least certain. The order by agreement is there on request; where
ground truth is given, both are measured against it.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mal_client.images.image_files import ImageFiles
from mal_client.images.image_input import read_file
from mal_client.types import BoxXywh
from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.coco.stream import CocoHead, read_list, scan_coco
from mal_train.core.errors import BadDataset, ConfigError
from mal_train.core.masks.flags import FLAG_DESCRIPTIONS
from mal_train.core.masks.images import read_header
from mal_train.core.masks.rle import Rle, from_segmentation, iou
from mal_train.core.metrics.score_quality import bad_in_worst, spearman
from mal_train.core.report.page import format_metric

BAD_IOU: Final = 0.5
"""A mask below is bad: as in COCO's AP50, it would not count as found."""

NO_MASK: Final = -1.0
"""Key of an annotation without a mask: before all that have one."""

LISTED: Final = 5
"""As many of the worst are named on a terminal."""

FLAG_MEANINGS: Final[Mapping[str, str]] = {
    **{str(flag): text for flag, text in FLAG_DESCRIPTIONS.items()},
    "CROWD": "a region of many objects, copied through",
}
"""What each flag of a labeled file means, as text for users."""


class SortBy(StrEnum):
    """What the order goes by."""

    SCORE = "score"
    AGREEMENT = "agreement"


@dataclass(frozen=True)
class QueueItem:
    """One annotation to look at.

    Attributes:
        rank: place in the queue, from 1.
        row: as the labeled file holds it.
        image: its image.
        box: x, y, w, h in px.
        key: what the order goes by; NO_MASK without a mask.
        rle: the mask; None without one, or where it cannot be read.
        truth: the true mask; None where none is known.
        iou: of mask and true mask; None likewise.
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
        """Why to look, in words: its error, or its flags."""
        error = self.row.get("error")
        if error is not None:
            return [str(error.get("message", error) if isinstance(error, dict) else error)]
        flags = self.row.get("flags")
        return [FLAG_MEANINGS.get(flag, flag) for flag in flags] if isinstance(flags, list) else []

    def line(self, by: SortBy) -> str:
        """For a terminal: which annotation, its image, what it got, and why."""
        got = "no mask" if self.key == NO_MASK else f"{by} {self.key:.2f}"
        why = "".join(f"; {reason}" for reason in self.reasons)
        return f"annotation {json.dumps(self.row.get('id'))}, {self.image.file_name or 'no image'}: {got}{why}"


@dataclass(frozen=True)
class OrderQuality:
    """What an order is worth, measured against ground truth.

    Attributes:
        by: the order.
        count: masks that were compared.
        bad_count: those with an IoU below BAD_IOU.
        spearman: rank correlation of key and IoU; None when one of them is constant.
        bad_in_worst_tenth: share of the bad masks that stands in the worst 10 %; a random order gives 0.1.
        bad_in_worst_fifth: the same for 20 %.
    """

    by: SortBy
    count: int
    bad_count: int
    spearman: float | None
    bad_in_worst_tenth: float | None
    bad_in_worst_fifth: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**vars(self), "by": str(self.by)}


@dataclass
class ReviewQueue:
    """The queue of a labeled file.

    Attributes:
        by: what the order goes by.
        masks: annotations with a mask and a key.
        failed: annotations without a mask, which come first.
        left_out: crowd regions, and annotations that carry no key (masks that were kept).
        flags: annotations by flag.
        worst: the first ones.
        qualities: of each order that the file allows, where ground truth was given.
    """

    by: SortBy
    masks: int = 0
    failed: int = 0
    left_out: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    worst: list[QueueItem] = field(default_factory=list)
    qualities: list[OrderQuality] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "by": str(self.by),
            "masks": self.masks,
            "failed": self.failed,
            "left_out": self.left_out,
            "flags": dict(self.flags),
            "orders": [quality.to_dict() for quality in self.qualities],
            "worst": [
                {
                    "rank": item.rank,
                    "annotation_id": item.row.get("id"),
                    "image_id": item.row.get("image_id"),
                    "file_name": item.image.file_name,
                    "score": item.row.get("score"),
                    "agreement": item.row.get("agreement"),
                    "IoU": item.iou,
                    "reasons": item.reasons,
                }
                for item in self.worst
            ],
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [
            f"{self.masks} masks, {self.failed} without a mask, {self.left_out} left out; worst first by {self.by}"
        ]
        lines += [f"{count:>8}  {flag:<16}{FLAG_MEANINGS.get(flag, '')}" for flag, count in self.flags.most_common()]
        lines += [
            f"order by {quality.by}: Spearman {format_metric(quality.spearman)} with IoU on {quality.count} masks; of "
            f"{quality.bad_count} with IoU < {BAD_IOU:g} the worst 10 % hold "
            f"{format_metric(quality.bad_in_worst_tenth)}, the worst 20 % {format_metric(quality.bad_in_worst_fifth)}"
            for quality in self.qualities
        ]
        if self.worst:
            lines.append("the worst:")
        return lines + [f"  {item.rank}. {item.line(self.by)}" for item in self.worst[:LISTED]]


def review_queue(
    labeled_json: Path, *, by: SortBy = SortBy.SCORE, count: int = 100, truth: Path | None = None
) -> ReviewQueue:
    """Reads a labeled file twice, and keeps its `count` worst rows alone.

    Args:
        labeled_json: what `mal-client label` wrote.
        by: the order.
        count: how many of the worst to keep.
        truth: a COCO file with the true masks of the same annotation ids.

    Raises:
        BadDataset: a file is unusable.
        ConfigError: no annotation carries what the order goes by, or none has a true mask in `truth`.
    """
    sizes = {
        row["id"]: (row["height"], row["width"])
        for row in read_list(labeled_json, "images")
        if isinstance(row, dict) and isinstance(row.get("id"), JsonId) and {"width", "height"} <= row.keys()
    }
    keys = _SortKeys(ReviewQueue(by), None if truth is None else _Truth(truth), sizes)
    head = scan_coco(labeled_json, keys.take)
    queue = keys.queue
    if not queue.masks and not queue.failed:
        missing = "an agreement (label with --agreement)" if by is SortBy.AGREEMENT else "a score (label it first)"
        raise ConfigError(f"{labeled_json}: no annotation carries {missing}")
    places = keys.worst(count)
    wanted = {int(place): rank for rank, place in enumerate(places, start=1)}
    kept: dict[int, QueueItem] = {}

    def keep(at: int, row: Annotation) -> None:
        if at in wanted:
            kept[wanted[at]] = keys.item(wanted[at], at, row, head)

    scan_coco(labeled_json, keep)
    queue.worst = [kept[rank] for rank in sorted(kept)]
    queue.qualities = keys.qualities()
    if truth is not None and queue.masks and not queue.qualities:
        raise ConfigError(
            f"{truth}: holds no true mask of an annotation of {labeled_json}, by its id and image; give the file with "
            "the true masks of these annotations, or leave it out"
        )
    return queue


def write_worst(queue: ReviewQueue, labeled_json: Path, output: Path) -> None:
    """The worst as a COCO file of their own, in their order, for any tool that reads COCO.

    Each row gets a `review_rank`. Images are those that have a row.
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
    """The items by the file name of their image, in the order of the queue; those without an image are left out."""
    found: dict[str, list[QueueItem]] = {}
    for item in items:
        if item.image.file_name:
            found.setdefault(item.image.file_name, []).append(item)
    return found


def frame_size(item: QueueItem, files: ImageFiles) -> tuple[int, int]:
    """Width and height in px of an item's image: as its row states them, else as the file's header does.

    Raises:
        BadImage: neither tells.
    """
    if item.image.size_wh is not None:
        return item.image.size_wh
    path = files.path(item.image.file_name)
    return read_header(read_file(path), str(path)).size_wh


def category_names(labeled_json: Path) -> dict[object, str]:
    """Names of a file's categories by id."""
    rows = (row for row in read_list(labeled_json, "categories") if isinstance(row, dict))
    return {row.get("id"): str(row.get("name", row.get("id"))) for row in rows}


class _Truth:
    """True masks by annotation id, encoded."""

    def __init__(self, path: Path) -> None:
        self._rows: dict[JsonId, tuple[JsonId | None, Any]] = {}
        scan_coco(path, self._take)

    def mask(self, row: Annotation, rle: Rle) -> Rle | None:
        """The true mask of a row; None where there is none to compare with."""
        image_id, segmentation = self._rows.get(row.id, (None, None)) if row.id is not None else (None, None)
        if not segmentation or image_id != row.image_id:
            return None
        try:
            return from_segmentation(segmentation, rle.height, rle.width)
        except BadDataset:
            return None

    def _take(self, _: int, row: Annotation) -> None:
        if row.id is not None and row.problem is None and not row.iscrowd:
            self._rows[row.id] = (row.image_id, row.raw.get("segmentation"))


class _SortKeys:
    """The order of a file, a few bytes a row."""

    def __init__(self, queue: ReviewQueue, truth: _Truth | None, sizes: Mapping[Any, tuple[Any, Any]]) -> None:
        self.queue = queue
        self._sizes = sizes
        self._truth = truth
        self._keys = array("d")
        self._measured: dict[SortBy, tuple[list[float], list[float]]] = {by: ([], []) for by in SortBy}

    def take(self, _: int, row: Annotation) -> None:
        """Notes one annotation."""
        flags = row.raw.get("flags")
        if isinstance(flags, list):
            self.queue.flags.update(str(flag) for flag in flags)
        key = _key(row, self.queue.by)
        self._keys.append(np.nan if key is None else key)
        if key is None:
            self.queue.left_out += 1
        elif key == NO_MASK:
            self.queue.failed += 1
        else:
            self.queue.masks += 1
            self._measure(row)

    def worst(self, count: int) -> NDArray[np.int64]:
        """Places of the first rows of the queue."""
        keys = np.frombuffer(self._keys, dtype=np.float64)
        # NaN sorts last. Stable: rows of one key stay in the order of the file.
        order = np.argsort(keys, kind="stable")
        return order[: min(count, int(np.count_nonzero(~np.isnan(keys))))]

    def item(self, rank: int, at: int, row: Annotation, head: CocoHead) -> QueueItem:
        """A row of the queue with all that is known."""
        image = None if row.image_id is None else head.images.get(row.image_id)
        if image is None:
            image = ImageInfo("", "", None, None, "its image is not in the file")
        rle = _mask(row, self._sizes.get(row.image_id))
        truth = None if rle is None or self._truth is None else self._truth.mask(row, rle)
        found = None if rle is None or truth is None else iou(rle, truth)
        return QueueItem(rank, row.raw, image, row.box_xywh, self._keys[at], rle, truth, found)

    def qualities(self) -> list[OrderQuality]:
        """Each order against ground truth."""
        return [
            OrderQuality(
                by=by,
                count=len(ious),
                bad_count=int(np.count_nonzero(np.asarray(ious) < BAD_IOU)),
                spearman=spearman(keys, ious),
                bad_in_worst_tenth=bad_in_worst(keys, np.asarray(ious) < BAD_IOU, 0.1),
                bad_in_worst_fifth=bad_in_worst(keys, np.asarray(ious) < BAD_IOU, 0.2),
            )
            for by, (keys, ious) in self._measured.items()
            if ious
        ]

    def _measure(self, row: Annotation) -> None:
        if self._truth is None:
            return
        rle = _mask(row, self._sizes.get(row.image_id))
        truth = None if rle is None else self._truth.mask(row, rle)
        if rle is None or truth is None:
            return
        found = iou(rle, truth)
        for by, (keys, ious) in self._measured.items():
            key = _key(row, by)
            if key is not None:
                keys.append(key)
                ious.append(found)


def _key(row: Annotation, by: SortBy) -> float | None:
    """What orders a row; None for one that does not belong into the queue."""
    if row.iscrowd:
        return None
    if "error" in row.raw:
        return NO_MASK
    value = row.raw.get(str(by))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _mask(row: Annotation, size_hw: tuple[Any, Any] | None) -> Rle | None:
    """The mask of a row, whether run lengths or polygons; None without one, or where it cannot be read."""
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

"""What a bulk job has to do, in compact form: a million annotations take some 100 MB, whatever their rows hold."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mal_client.bulk.work_queue import WorkItem
from mal_client.types import DatasetOptions, RowFilter
from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId
from mal_train.core.coco.stream import CocoHead, scan_coco
from mal_train.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

LISTED = 5


class RowAction(IntEnum):
    """What becomes of a row."""

    ASK = 0
    KEEP = 1
    """Copied as it is."""
    CROWD = 2
    """Copied with its flag."""
    FAULTY = 3
    """Listed with the fault that was found when it was read."""


@dataclass(frozen=True)
class DatasetPlan:
    """The rows of a file by their place.

    Attributes:
        head: the file without its annotations.
        images: in file order.
        plans: a `RowAction` for each row.
        boxes: x, y, w, h of each row, one after the other; px.
        image_at: place of each row's image in `images`; -1 without one.
    """

    head: CocoHead
    images: list[ImageInfo]
    plans: bytearray
    boxes: array[float]
    image_at: array[int]

    def image_of(self, item: WorkItem) -> ImageInfo:
        """Returns the image of an item; the key of an item is the index of its image."""
        return self.images[int(item.key)]

    def asked_places(self) -> Iterator[tuple[int, int]]:
        """(place, place of its image) of each row to label."""
        return ((at, self.image_at[at]) for at, plan in enumerate(self.plans) if plan == RowAction.ASK)

    def remaining(
        self, is_answered: Callable[[int], bool], has_image: Callable[[int], bool] | None = None
    ) -> PendingRows:
        """What is left of the rows to label; `has_image` tells by its place whether an image takes part."""
        places = np.flatnonzero(np.frombuffer(self.plans, dtype=np.uint8) == RowAction.ASK)
        image_at = np.frombuffer(self.image_at, dtype=np.int32)
        if has_image is not None:
            takes_part = np.fromiter(map(has_image, range(len(self.images))), dtype=np.bool_)
            places = places[takes_part[image_at[places]]] if len(places) else places
        open_places = np.fromiter((at for at in places.tolist() if not is_answered(at)), dtype=np.int64)
        return PendingRows(
            work=self,
            places=open_places[np.argsort(image_at[open_places], kind="stable")],
            boxes_left=np.bincount(image_at[open_places], minlength=len(self.images)).astype(np.int32),
            asked=places,
            images_total=len(np.unique(image_at[places])),
        )


@dataclass
class PendingRows:
    """Rows that wait for an answer, image by image.

    Attributes:
        work: all rows.
        places: of the waiting rows, in the order of their images.
        boxes_left: unanswered boxes of each image; the caller counts them down.
        asked: places of all rows to label, answered or not.
        images_total: images of those.
    """

    work: DatasetPlan
    places: np.ndarray[tuple[int], np.dtype[np.int64]]
    boxes_left: np.ndarray[tuple[int], np.dtype[np.int32]]
    asked: np.ndarray[tuple[int], np.dtype[np.int64]]
    images_total: int

    def images_open(self) -> int:
        """Images with unanswered boxes."""
        return int(np.count_nonzero(self.boxes_left))

    def items(self, max_boxes: int) -> Iterator[WorkItem]:
        """One item for each image, or several for one with more boxes than the server takes."""
        if not len(self.places):
            return
        image_at = np.frombuffer(self.work.image_at, dtype=np.int32)[self.places]
        starts = np.concatenate(([0], np.flatnonzero(np.diff(image_at)) + 1))
        ends = np.append(starts[1:], len(self.places))
        boxes = self.work.boxes
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            name = str(image_at[start])
            for part, first in enumerate(range(start, end, max_boxes)):
                keys = self.places[first : min(end, first + max_boxes)].tolist()
                yield WorkItem(
                    name if part == 0 else f"{name}.part{part}",
                    {at: (boxes[4 * at], boxes[4 * at + 1], boxes[4 * at + 2], boxes[4 * at + 3]) for at in keys},
                )


def read_work(coco_json: Path, how: DatasetOptions) -> DatasetPlan:
    """Scans a COCO file.

    Raises:
        BadDataset: it is unusable as a whole.
        ConfigError: an id was asked for that is not there.
    """
    gathered = _Gathered(how)
    head = scan_coco(coco_json, gathered.take)
    gathered.refuse_unknown_ids()
    in_file = {image_id: at for at, image_id in enumerate(head.images)}
    place = [in_file.get(image_id, -1) for image_id in gathered.met]
    image_at = array("i", (place[nth] if nth >= 0 else -1 for nth in gathered.image_nth))
    return DatasetPlan(head, list(head.images.values()), gathered.plans, gathered.boxes, image_at)


@dataclass
class _Gathered:
    """What a scan takes from each row."""

    how: DatasetOptions
    plans: bytearray = field(default_factory=bytearray)
    boxes: array[float] = field(default_factory=lambda: array("d"))
    image_nth: array[int] = field(default_factory=lambda: array("i"))
    met: dict[JsonId, int] = field(default_factory=dict)
    """Image ids in the order in which rows name them."""
    found_ids: set[JsonId] = field(default_factory=set)

    def take(self, _: int, row: Annotation) -> None:
        self.plans.append(self._plan(row))
        self.boxes.extend(row.box_xywh)
        self.image_nth.append(-1 if row.image_id is None else self.met.setdefault(row.image_id, len(self.met)))

    def refuse_unknown_ids(self) -> None:
        unknown = [value for value in self.how.ids if value not in self.found_ids]
        if unknown:
            listed = ", ".join(map(repr, unknown[:LISTED]))
            raise ConfigError(f"ids: {listed} ({len(unknown)} in all) not among the annotation ids of the file")

    def _plan(self, row: Annotation) -> RowAction:
        if not self._is_wanted(row, self.how.ids):
            return RowAction.KEEP
        if row.problem is not None:
            return RowAction.FAULTY
        return RowAction.CROWD if row.iscrowd else RowAction.ASK

    def _is_wanted(self, row: Annotation, ids: Collection[JsonId]) -> bool:
        if row.id is None:
            return self.how.only in (RowFilter.ALL, RowFilter.MISSING)
        if self.how.only is RowFilter.MISSING:
            return not has_mask(row)
        if self.how.only is RowFilter.FLAGGED:
            return "error" in row.raw or (bool(row.raw.get("flags")) and not row.iscrowd)
        if self.how.only is RowFilter.IDS:
            if row.id in ids:
                self.found_ids.add(row.id)
            return row.id in ids
        return True


def has_mask(row: Annotation) -> bool:
    """Whether a row already holds a mask worth keeping: crowd regions are copied anyway, failed rows hold none."""
    return bool(row.raw.get("segmentation")) and "error" not in row.raw and not row.iscrowd

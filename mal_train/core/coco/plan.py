"""Rows of a COCO file and the action for each, in compact form: a million annotations take some 100 MB."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import overload

import numpy as np

from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId
from mal_train.core.coco.box_form import likely_form
from mal_train.core.coco.detections import DetectionRows
from mal_train.core.coco.fields import has_segmentation
from mal_train.core.coco.parquet_share import ParquetShare
from mal_train.core.coco.stream import CocoHead, scan_coco
from mal_train.core.errors import ConfigError
from mal_train.core.masks.points import Point
from mal_train.core.settings import COCO_RULES, RowFilter, RowRules
from mal_train.core.storage.addresses import Location

LISTED = 5
NO_IMAGE = -1

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]


class RowAction(IntEnum):
    """Treatment of one row."""

    LABEL = 0
    COPY = 1
    """Copied unchanged."""
    COPY_CROWD = 2
    """Copied with the flag CROWD."""
    REPORT = 3
    """Listed with the error that was found when the file was read."""


@dataclass(frozen=True)
class DatasetPlan:
    """Rows of a COCO file; `index` is the position of a row in the file, from 0.

    Attributes:
        head: the file without its annotations.
        images: in file order.
        actions: a `RowAction` for each row.
        boxes: x, y, w, h of each row, one after the other; px.
        image_index: index in `images` for each row; `NO_IMAGE` without one.
        detections: the rows of a results list that take the place of the file's annotations; None without such a list.
        points: points of the rows to label that have some.
    """

    head: CocoHead
    images: list[ImageInfo]
    actions: bytearray
    boxes: array[float]
    image_index: array[int]
    detections: DetectionRows | None = None
    points: dict[int, tuple[Point, ...]] = field(default_factory=dict)

    def box(self, index: int) -> tuple[float, float, float, float]:
        """Returns x, y, w, h of a row in px."""
        x, y, w, h = self.boxes[4 * index : 4 * index + 4]
        return x, y, w, h

    def form_note(self) -> str | None:
        """Returns a sentence if the boxes to label have another form than COCO's (`box_form`); None otherwise."""
        to_label = np.flatnonzero(np.frombuffer(self.actions, dtype=np.uint8) == RowAction.LABEL)
        sizes = np.array([image.size_wh or (np.nan, np.nan) for image in self.images], dtype=np.float64).reshape(-1, 2)
        boxes = np.frombuffer(self.boxes, dtype=np.float64).reshape(-1, 4)[to_label]
        image_index = np.frombuffer(self.image_index, dtype=np.int32)[to_label]
        return likely_form(boxes, sizes[image_index])[1] or None

    def rows_to_label(self) -> Iterator[tuple[int, int]]:
        """Yields (index, index of its image) of each row to label."""
        return (
            (index, self.image_index[index]) for index, action in enumerate(self.actions) if action == RowAction.LABEL
        )

    def pending(
        self,
        has_label: Callable[[int], bool],
        has_image: Callable[[int], bool] | None = None,
        *,
        complete_images: bool = False,
    ) -> PendingRows:
        """Returns the rows that still need a label.

        Args:
            has_label: tells by index whether a row needs no further attempt.
            has_image: tells by index whether an image belongs to this run; None: all do.
            complete_images: if one row of an image still needs a label, take all rows of that image.
        """
        to_label = np.flatnonzero(np.frombuffer(self.actions, dtype=np.uint8) == RowAction.LABEL)
        image_index = np.frombuffer(self.image_index, dtype=np.int32)
        if has_image is not None and len(to_label):
            is_ours = np.fromiter(map(has_image, range(len(self.images))), dtype=np.bool_)
            to_label = to_label[is_ours[image_index[to_label]]]
        is_pending = np.fromiter((not has_label(index) for index in to_label.tolist()), dtype=np.bool_)
        if complete_images:
            is_pending = np.isin(image_index[to_label], image_index[to_label[is_pending]])
        pending = to_label[is_pending]
        return PendingRows(
            plan=self,
            indices=pending[np.argsort(image_index[pending], kind="stable")],
            boxes_left=np.bincount(image_index[pending], minlength=len(self.images)).astype(np.int32),
            to_label=to_label,
            images_total=len(np.unique(image_index[to_label])),
        )


@dataclass
class PendingRows:
    """Rows that still need a label, image by image.

    Attributes:
        plan: all rows.
        indices: of the pending rows, in the order of their images.
        boxes_left: pending boxes of each image; the caller counts them down.
        to_label: indices of all rows to label in this run, pending or not.
        images_total: number of images of those.
    """

    plan: DatasetPlan
    indices: Indices
    boxes_left: np.ndarray[tuple[int], np.dtype[np.int32]]
    to_label: Indices
    images_total: int

    def images_open(self) -> int:
        """Returns the number of images with pending boxes."""
        return int(np.count_nonzero(self.boxes_left))

    def by_image(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (index of an image, indices of its pending rows) of each image with pending rows."""
        bounds = self._bounds()
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            yield self.plan.image_index[self.indices[start]], self.indices[start:end].tolist()

    def annotations(self) -> PendingImages:
        """Returns each image with pending rows and its annotations, which are built on access."""
        return PendingImages(self, self._bounds())

    def _bounds(self) -> Indices:
        """Returns the place in `indices` of the first row of each image, and the number of rows at the end."""
        image_index = np.frombuffer(self.plan.image_index, dtype=np.int32)[self.indices]
        is_first = np.diff(image_index, prepend=NO_IMAGE) != 0
        return np.append(np.flatnonzero(is_first), len(self.indices))


class PendingImages(Sequence[tuple[ImageInfo, list[Annotation]]]):
    """Images with the annotations that need a label, both built from the plan on access. A slice is a view.

    The annotations have a box, points and an image, but neither id, category nor JSON value: the plan keeps none.
    """

    def __init__(self, pending: PendingRows, bounds: Indices, images: range | None = None) -> None:
        self._pending = pending
        self._bounds = bounds
        self._images = range(len(bounds) - 1) if images is None else images

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> tuple[ImageInfo, list[Annotation]]: ...
    @overload
    def __getitem__(self, index: slice) -> PendingImages: ...
    def __getitem__(self, index: int | slice) -> tuple[ImageInfo, list[Annotation]] | PendingImages:
        if isinstance(index, slice):
            return PendingImages(self._pending, self._bounds, self._images[index])
        number = self._images[index]
        rows = self._pending.indices[self._bounds[number] : self._bounds[number + 1]].tolist()
        plan = self._pending.plan
        image = plan.images[plan.image_index[rows[0]]]
        return image, [
            Annotation(None, image.id, None, plan.box(row), iscrowd=False, raw={}, points=plan.points.get(row, ()))
            for row in rows
        ]


def read_plan(
    coco_json: Location,
    only: RowFilter = RowFilter.ALL,
    ids: Collection[JsonId] = (),
    share: ParquetShare | None = None,
    rules: RowRules = COCO_RULES,
) -> DatasetPlan:
    """Scans a COCO file and decides on the action for each row.

    Args:
        coco_json: the file.
        only: which annotations are labeled.
        ids: annotation ids for `RowFilter.IDS`.
        share: the part of the file to read; None reads the whole file.
        rules: how rows are read.

    Raises:
        BadDataset: the file as a whole is unusable.
        ConfigError: `ids` has an id that the file does not have. One of several shares does not know the ids of others.
    """
    scan = _Scan(only, frozenset(ids))
    head = scan_coco(coco_json, scan.add, rules=rules) if share is None else share.scan(scan.add, rules)
    if share is None or share.is_whole:
        scan.refuse_unknown_ids()
    return scan.plan(head)


def read_detection_plan(coco_json: Location, results_json: Path, rules: RowRules = COCO_RULES) -> DatasetPlan:
    """Scans a COCO file and a results list whose rows take the place of its annotations; all of them are labeled.

    Raises:
        BadDataset: a file as a whole is unusable.
    """
    head = scan_coco(coco_json, lambda _index, _row: None)
    rows = DetectionRows(results_json, head.images, rules)
    scan = _Scan(RowFilter.ALL, frozenset())
    for index, (_, annotation) in enumerate(rows):
        scan.add(index, annotation)
    return replace(scan.plan(replace(head, count=rows.count)), detections=rows)


def has_mask(row: Annotation) -> bool:
    """Returns whether a row holds a mask to keep; crowd regions are copied anyway, and failed rows hold none."""
    return has_segmentation(row.raw) and "error" not in row.raw and not row.iscrowd


@dataclass
class _Scan:
    """Columns of a `DatasetPlan`, filled row by row."""

    only: RowFilter
    ids: frozenset[JsonId]
    actions: bytearray = field(default_factory=bytearray)
    boxes: array[float] = field(default_factory=lambda: array("d"))
    image_numbers: array[int] = field(default_factory=lambda: array("i"))
    """Number of each row's image in `image_ids`."""
    image_ids: dict[JsonId, int] = field(default_factory=dict)
    """Numbers by image id, in the order in which rows name them; the images may follow the rows in the file."""
    found_ids: set[JsonId] = field(default_factory=set)
    points: dict[int, tuple[Point, ...]] = field(default_factory=dict)

    def add(self, _: int, row: Annotation) -> None:
        action = self._action(row)
        if row.points and action is RowAction.LABEL:
            self.points[len(self.actions)] = row.points
        self.actions.append(action)
        self.boxes.extend(row.box_xywh)
        self.image_numbers.append(
            NO_IMAGE if row.image_id is None else self.image_ids.setdefault(row.image_id, len(self.image_ids))
        )

    def plan(self, head: CocoHead) -> DatasetPlan:
        in_file = {image_id: index for index, image_id in enumerate(head.images)}
        named = [in_file.get(image_id, NO_IMAGE) for image_id in self.image_ids]
        image_index = array("i", (named[number] if number >= 0 else NO_IMAGE for number in self.image_numbers))
        images = list(head.images.values())
        return DatasetPlan(head, images, self.actions, self.boxes, image_index, points=self.points)

    def refuse_unknown_ids(self) -> None:
        unknown = [value for value in self.ids if value not in self.found_ids]
        if unknown:
            listed = ", ".join(map(repr, unknown[:LISTED]))
            raise ConfigError(
                f"ids: {len(unknown)} are not annotation ids of the file: {listed}{', …' * (len(unknown) > LISTED)}"
            )

    def _action(self, row: Annotation) -> RowAction:
        if not self._is_selected(row):
            return RowAction.COPY
        if row.problem is not None:
            return RowAction.REPORT
        return RowAction.COPY_CROWD if row.iscrowd else RowAction.LABEL

    def _is_selected(self, row: Annotation) -> bool:
        if row.id is None:
            return self.only in (RowFilter.ALL, RowFilter.MISSING)
        if self.only is RowFilter.MISSING:
            return not has_mask(row)
        if self.only is RowFilter.FLAGGED:
            return "error" in row.raw or (bool(row.raw.get("flags")) and not row.iscrowd)
        if self.only is RowFilter.IDS:
            if row.id in self.ids:
                self.found_ids.add(row.id)
            return row.id in self.ids
        return True

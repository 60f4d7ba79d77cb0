"""Looks at a data set before any server does: what would fail, what would surprise, what there is. Sends nothing.

The rules are those that labeling applies, so what this report calls an error is what `label` would list as failed.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Final

from mal_client.dataset_check.report import CheckReport, Severity
from mal_client.images.image_files import ImageFiles
from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId, Reason
from mal_train.core.coco.stream import CocoHead, scan_coco
from mal_train.core.errors import BadBox, BadImage
from mal_train.core.masks.geometry import Box, check_box
from mal_train.core.masks.images import read_header, read_image
from mal_train.core.settings import SIZE_NAMES, size_class

SMALL_SIDE_PX: Final = 2.0
_IMAGES_AT_ONCE: Final = 64


def check_dataset(
    coco_json: Path,
    images_dir: Path | str,
    *,
    decode: bool = True,
    on_image: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Reads the file twice and every image once.

    Args:
        coco_json: the annotations.
        images_dir: the folder that `file_name` is relative to, or a pattern (`ImageFiles`).
        decode: also decode the pixels, which alone finds files that are cut off; else headers only.
        on_image: called with (images done, images in all).

    Raises:
        BadDataset: not a COCO file at all, or no image can be there.
    """
    report = CheckReport(coco_json)
    head = scan_coco(coco_json, lambda _at, _row: None, allow_repeated_ids=True)
    report.images, report.annotations = len(head.images), head.count
    _note_ids(report, head)
    _note_categories(report, head)
    files = _Files(report, images_dir, decode)
    for done, _ in enumerate(files.look(head.images.values()), start=1):
        if on_image is not None:
            on_image(done, report.images)
    files.note_unlisted()
    rows = _Rows(report, head, files.sizes)
    scan_coco(coco_json, rows.take, allow_repeated_ids=True)
    rows.finish()
    return report


def _note_ids(report: CheckReport, head: CocoHead) -> None:
    for image_id in head.repeated_image_ids:
        report.note("DUPLICATE_IMAGE_ID", Severity.FATAL, "an image id stands more than once", f"image {image_id!r}")
    for annotation_id in head.repeated_annotation_ids:
        report.note(
            "DUPLICATE_ANNOTATION_ID",
            Severity.FATAL,
            "an annotation id stands more than once",
            f"annotation {annotation_id!r}",
        )
    for text in head.notes:
        report.note("ROW_UNUSABLE", Severity.WARNING, "a row of images or categories that cannot be used", text)
    for image in head.images.values():
        if image.problem is not None:
            report.note(str(Reason.IMAGE_UNUSABLE), Severity.ERROR, "an image row that cannot be used", image.problem)


def _note_categories(report: CheckReport, head: CocoHead) -> None:
    names = Counter(head.category_names.values())
    for name, count in names.items():
        if count > 1:
            ids = ", ".join(str(key) for key, value in head.category_names.items() if value == name)
            report.note("CATEGORY_NAMED_TWICE", Severity.WARNING, "categories of one name", f"{name}: ids {ids}")
    ids_used = sorted(key for key in head.category_names if isinstance(key, int))
    for low, high in pairwise(ids_used):
        if high > low + 1:
            report.note(
                "CATEGORY_ID_GAP",
                Severity.NOTE,
                "ids that no category has; some tools take ids for places",
                _gap(low, high),
            )


def _gap(low: int, high: int) -> str:
    return f"{low + 1}" if high == low + 2 else f"{low + 1} to {high - 1}"


class _Files:
    """Looks at the image files, a few at a time."""

    def __init__(self, report: CheckReport, images_dir: Path | str, decode: bool) -> None:
        self.sizes: dict[JsonId, tuple[int, int] | None] = {}
        """Width and height of the images whose row does not say; None for those without a readable file."""
        self._report = report
        self._images = ImageFiles(images_dir)
        self._decode = decode
        self._names: set[str] = set()

    def look(self, images: Iterable[ImageInfo]) -> Iterator[ImageInfo]:
        """Gives each image back when it was looked at."""
        usable = iter(images)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            while some := list(islice(usable, _IMAGES_AT_ONCE)):
                for image, found in zip(some, pool.map(self._look_at, some), strict=True):
                    self._take(image, found)
                    yield image

    def note_unlisted(self) -> None:
        """Pictures that no row names; after `look`."""
        for name in self._images.unlisted(self._names):
            self._report.note("FILE_NOT_LISTED", Severity.NOTE, "a picture that no row of images names", name)

    def _look_at(self, image: ImageInfo) -> tuple[tuple[int, int], int, int] | BadImage | None:
        if image.problem is not None:
            return None
        try:
            path = self._images.path(image.file_name)
            if self._decode:
                read_image(path, expected_wh=image.size_wh)
            header = read_header(path.read_bytes(), str(path))
        except BadImage as fault:
            return fault
        except (OSError, ValueError) as fault:
            return BadImage(f"{image.file_name}: cannot be read ({fault})", "IMAGE_NOT_FOUND")
        if image.size_wh not in (None, header.size_wh):
            width, height = header.size_wh
            return BadImage(
                f"{path}: stored as {width}x{height} px but stated as {image.width}x{image.height}",
                "IMAGE_SIZE_MISMATCH",
            )
        return header.size_wh, header.orientation, header.frames

    def _take(self, image: ImageInfo, found: tuple[tuple[int, int], int, int] | BadImage | None) -> None:
        if image.file_name in self._names:
            text = f"image {image.id!r}: {image.file_name}"
            self._report.note("FILE_NAMED_TWICE", Severity.WARNING, "two image rows name the same file", text)
        self._names.add(image.file_name)
        if found is None or isinstance(found, BadImage):
            self.sizes[image.id] = None
            if found is not None:
                self._report.note(found.reason, Severity.ERROR, _IMAGE_MEANINGS.get(found.reason, ""), str(found))
            return
        size_wh, orientation, frames = found
        self._report.image_sizes[f"{size_wh[0]} × {size_wh[1]}"] += 1
        if image.size_wh is None:
            self.sizes[image.id] = size_wh
        if orientation != 1:
            self._report.note(
                "EXIF_ORIENTATION",
                Severity.WARNING,
                "viewers turn the picture, boxes and masks refer to the stored pixels",
                f"{image.file_name}: EXIF orientation {orientation}",
            )
        if frames > 1:
            self._report.note(
                "SEVERAL_FRAMES",
                Severity.WARNING,
                "only the first frame is used",
                f"{image.file_name}: {frames} frames",
            )


_IMAGE_MEANINGS: Final = {
    "IMAGE_NOT_FOUND": "the file is missing or cannot be read",
    "IMAGE_DECODE_FAILED": "the file is damaged or cut off",
    "IMAGE_FORMAT": "no picture, or of a kind that is not read",
    "IMAGE_TOO_LARGE": "larger than servers accept by default",
    "IMAGE_SIZE_MISMATCH": "the file has another size than its row states",
}


class _Rows:
    """Looks at the annotations, one at a time."""

    def __init__(self, report: CheckReport, head: CocoHead, sizes: dict[JsonId, tuple[int, int] | None]) -> None:
        self._report = report
        self._head = head
        self._sizes = sizes
        self._met: set[int] = set()
        self._with_boxes: set[JsonId] = set()
        for name in head.category_names.values():
            report.by_category[name] += 0

    def take(self, _: int, row: Annotation) -> None:
        """One annotation."""
        if row.image_id is not None:
            self._with_boxes.add(row.image_id)
        if row.problem is not None:
            if row.reason is not Reason.IMAGE_UNUSABLE:
                self._report.note(str(row.reason), Severity.ERROR, "an annotation that cannot be used", row.problem)
            return
        if row.category_id is not None:
            self._report.by_category[self._head.category_names[row.category_id]] += 1
        if row.iscrowd:
            self._report.note("CROWD", Severity.NOTE, "copied through unlabeled", f"annotation {row.id!r}")
            return
        # 64 bits of hash: a million boxes that differ collide with a chance of 1 in 30 million.
        mark = hash((row.image_id, row.category_id, row.box_xywh))
        if mark in self._met:
            text = f"annotation {row.id!r} on image {row.image_id!r}"
            self._report.note("DUPLICATE_BOX", Severity.WARNING, "same image, class and box as one before", text)
        self._met.add(mark)
        self._take_box(row)

    def finish(self) -> None:
        """What shows only at the end."""
        for name, count in self._report.by_category.items():
            if not count:
                self._report.note("CATEGORY_UNUSED", Severity.NOTE, "a category without annotations", name)
        for image in self._head.images.values():
            if image.id not in self._with_boxes:
                self._report.note("IMAGE_WITHOUT_BOXES", Severity.NOTE, "an image without annotations", image.file_name)

    def _take_box(self, row: Annotation) -> None:
        image = None if row.image_id is None else self._head.images.get(row.image_id)
        size_wh = None if image is None else image.size_wh or self._sizes.get(image.id)
        if size_wh is None:
            # Its file was reported already.
            return
        name = f"annotation {row.id!r}"
        try:
            (_, _, w, h), was_clipped = check_box(row.box_xywh, (size_wh[1], size_wh[0]), name)
        except BadBox as fault:
            kind, meaning = _fault_of_box(row.box_xywh)
            self._report.note(kind, Severity.ERROR, meaning, str(fault))
            return
        shown = "[" + ", ".join(f"{value:g}" for value in row.box_xywh) + "]"
        if was_clipped:
            text = f"{name}: {shown} on an image of {size_wh[0]}x{size_wh[1]} px"
            self._report.note("BOX_CLIPPED", Severity.WARNING, "a box that leaves its image and is cut to it", text)
        if min(w, h) <= SMALL_SIDE_PX:
            text = f"{name}: {shown}"
            self._report.note("BOX_SMALL", Severity.WARNING, f"a side of at most {SMALL_SIDE_PX:g} px", text)
        self._report.boxes_by_size[SIZE_NAMES[size_class(w * h)]] += 1
        self._report.box_sides[math.floor(math.log2(math.sqrt(w * h)))] += 1


def _fault_of_box(box_xywh: Box) -> tuple[str, str]:
    """(kind, meaning) of a box that no mask can answer."""
    if not all(map(math.isfinite, box_xywh)):
        return str(Reason.BAD_BOX), "a box with something that is no number"
    if not (box_xywh[2] > 0 and box_xywh[3] > 0):
        return "BOX_EMPTY", "a box without area: width and height must be above 0"
    return "BOX_OUTSIDE", "a box that holds no pixel of its image"

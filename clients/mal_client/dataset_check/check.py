"""Checks a dataset before any image is sent: finds errors, suspicious rows and statistics. Contacts no server.

Applies the rules of labeling: what the report counts as an error is what `label` would list as failed.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise
from typing import Final, NamedTuple

import numpy as np

from mal_client.dataset_check.report import CheckReport, Severity
from mal_client.images.image_files import ImageFiles
from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId, Reason
from mal_train.core.coco.box_form import has_form, likely_form
from mal_train.core.coco.fields import has_segmentation
from mal_train.core.coco.ground_truth import read_ground_truth
from mal_train.core.coco.json_values import as_json
from mal_train.core.coco.stream import CocoHead, scan_coco
from mal_train.core.errors import BadBox, BadGroundTruth, BadImage, BadPoint
from mal_train.core.images.container import ImageHeader
from mal_train.core.images.decoder import decode_image
from mal_train.core.images.folder_names import shown
from mal_train.core.images.header import DEFAULT_LIMITS, read_header
from mal_train.core.images.large_tiff import open_large
from mal_train.core.input_files import cause_of
from mal_train.core.masks.geometry import Box, box_pixels, check_box
from mal_train.core.masks.points import check_points
from mal_train.core.masks.rle import ignored_polygons
from mal_train.core.numbers import counted
from mal_train.core.settings import COCO_RULES, BoxForm, RowRules
from mal_train.core.size_class import SIZE_NAMES, size_class
from mal_train.core.storage.addresses import Location, redact
from mal_train.core.storage.read_ahead import READERS

SMALL_SIDE_PX: Final = 2.0
_IMAGES_AT_ONCE: Final = 64


def check_dataset(
    coco_json: Location,
    images_dir: ImageFiles | Location,
    *,
    decode: bool = True,
    rules: RowRules = COCO_RULES,
    on_image: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Checks every row of a COCO file and every image; reads the file twice and each image once.

    Args:
        coco_json: the annotations.
        images_dir: the folder or address that `file_name` is relative to, or a glob pattern; `ImageFiles` for files
            outside it.
        decode: also decode the pixels, which is the only way to find truncated files; False reads headers only.
        rules: how crowd regions and rotated boxes are read, as for labeling.
        on_image: called with (images checked, images in total).

    Raises:
        BadDataset: the file is not a COCO file, or the image folder does not exist.
        StorageError, StoreUnreachable: the store of the images cannot be used.
    """
    report = CheckReport(coco_json)
    head = scan_coco(coco_json, lambda _index, _row: None, allow_repeated_ids=True, rules=rules)
    report.images, report.annotations = len(head.images), head.count
    if not head.count:
        report.add(
            "NO_ANNOTATIONS", Severity.WARNING, "file has no annotation to label", counted(report.images, "image")
        )
    _check_ids(report, head)
    _check_categories(report, head)
    files = _FileChecker(report, images_dir, decode)
    files.images.expect(lambda: (image.file_name for image in head.images.values()))
    for done, _ in enumerate(files.check(head.images.values()), start=1):
        if on_image is not None:
            on_image(done, report.images)
    if all(image.file_name for image in head.images.values()):
        files.add_unlisted()
    rows = _RowChecker(report, head, files.sizes)
    scan_coco(coco_json, rows.check, allow_repeated_ids=True, rules=rules)
    rows.finish()
    return report


def _check_ids(report: CheckReport, head: CocoHead) -> None:
    for image_id in head.repeated_image_ids:
        report.add("DUPLICATE_IMAGE_ID", Severity.FATAL, "image ID is used more than once", f"image {image_id!r}")
    for annotation_id in head.repeated_annotation_ids:
        report.add(
            "DUPLICATE_ANNOTATION_ID",
            Severity.FATAL,
            "annotation ID is used more than once",
            f"annotation {annotation_id!r}",
        )
    for text in head.notes:
        report.add("ROW_UNUSABLE", Severity.WARNING, "row of images or categories is ignored", text)
    for image in head.images.values():
        if image.problem is not None:
            report.add(str(Reason.IMAGE_UNUSABLE), Severity.ERROR, "image row is invalid", image.problem)


def _check_categories(report: CheckReport, head: CocoHead) -> None:
    names = Counter(head.category_names.values())
    for name, count in names.items():
        if count > 1:
            ids = ", ".join(str(key) for key, value in head.category_names.items() if value == name)
            report.add("CATEGORY_NAMED_TWICE", Severity.WARNING, "categories share a name", f"{name}: ids {ids}")
    integer_ids = sorted(key for key in head.category_names if isinstance(key, int))
    for low, high in pairwise(integer_ids):
        if high > low + 1:
            report.add(
                "CATEGORY_ID_GAP",
                Severity.NOTE,
                "category IDs are not consecutive; some tools use IDs as indices",
                _gap(low, high),
            )


def _gap(low: int, high: int) -> str:
    return f"{low + 1}" if high == low + 2 else f"{low + 1} to {high - 1}"


class _FileChecker:
    """Checks the image files, several at a time."""

    def __init__(self, report: CheckReport, images_dir: ImageFiles | Location, decode: bool) -> None:
        self.sizes: dict[JsonId, tuple[int, int] | None] = {}
        """Width and height of the images whose row does not state them; None for those without a readable file."""
        self._report = report
        self.images = ImageFiles.of(images_dir)
        self._decode = decode
        self._names: set[str] = set()
        self._large: set[str] = set()
        """Names of images that are read by windows."""

    def check(self, images: Iterable[ImageInfo]) -> Iterator[ImageInfo]:
        """Yields each image after its file has been checked."""
        remaining = iter(images)
        with ThreadPoolExecutor(READERS if self.images.is_remote else os.cpu_count() or 1) as pool:
            while chunk := list(islice(remaining, _IMAGES_AT_ONCE)):
                for image, outcome in zip(chunk, pool.map(self._read, chunk), strict=True):
                    self._add(image, outcome)
                    yield image

    def add_unlisted(self) -> None:
        """Adds the image files that no row names; call it after `check`."""
        for name in self.images.unlisted(self._names):
            self._report.add("FILE_NOT_LISTED", Severity.NOTE, "no row names this image file", name)

    def _read(self, image: ImageInfo) -> ImageHeader | BadImage | None:
        """Returns the header of the file or its error; None for a row that was reported already."""
        if image.problem is not None:
            return None
        try:
            location = self.images.locate(image.file_name)
            path = redact(location)
            large = open_large(location, DEFAULT_LIMITS, path)
            if large is None:
                content = self.images.read(image.file_name)
                if self._decode:
                    decode_image(content, expected_wh=image.size_wh, name=path)
                header = read_header(content, path)
            else:
                header, reader = large
                if self._decode:
                    reader.check()
                self._large.add(image.file_name)
        except BadImage as error:
            return error
        except (OSError, ValueError) as error:
            return BadImage(f"{image.file_name}: cannot be read ({cause_of(error)})", "IMAGE_NOT_FOUND")
        if image.size_wh not in (None, header.size_wh):
            width, height = header.size_wh
            return BadImage(
                f"{path}: file is {width}x{height} px; row states {image.width}x{image.height} px",
                "IMAGE_SIZE_MISMATCH",
            )
        return header

    def _add(self, image: ImageInfo, outcome: ImageHeader | BadImage | None) -> None:
        if image.problem is not None:
            self.sizes[image.id] = None
            return
        name = self.images.respelled(image.file_name)
        if name in self._names:
            text = f"image {image.id!r}: {image.file_name}"
            self._report.add("FILE_NAMED_TWICE", Severity.WARNING, "several image rows name the same file", text)
        self._names.add(name)
        if name != image.file_name:
            text = f"image {image.id!r}: {shown(image.file_name, name)} is {shown(name, image.file_name)}"
            self._report.add("FILE_RESPELLED", Severity.WARNING, "the folder has this file in another spelling", text)
        if outcome is None or isinstance(outcome, BadImage):
            self.sizes[image.id] = None
            if outcome is not None:
                meaning = _IMAGE_MEANINGS.get(outcome.reason, "")
                self._report.add(outcome.reason, Severity.ERROR, meaning, str(outcome))
            return
        self._report.image_sizes["{} × {}".format(*outcome.size_wh)] += 1
        if image.size_wh is None:
            self.sizes[image.id] = outcome.size_wh
        for issue in _HEADER_ISSUES:
            if issue.has(outcome):
                self._report.add(
                    issue.code, issue.severity, issue.meaning, f"{image.file_name}: {issue.detail(outcome)}"
                )
        if image.file_name in self._large:
            self._report.add(
                "IMAGE_BY_WINDOWS",
                Severity.NOTE,
                "image is larger than servers accept by default; each box is labeled from its part of the image",
                f"{image.file_name}: {outcome.size_wh[0]}x{outcome.size_wh[1]} px",
            )


class _HeaderIssue(NamedTuple):
    """An issue that the header of an image file shows.

    Attributes:
        code: of the issue.
        severity: of the issue.
        meaning: of the issue.
        has: returns True for a header with the issue.
        detail: returns what the header says.
    """

    code: str
    severity: Severity
    meaning: str
    has: Callable[[ImageHeader], bool]
    detail: Callable[[ImageHeader], str]


_HEADER_ISSUES: Final = (
    _HeaderIssue(
        "EXIF_ORIENTATION",
        Severity.WARNING,
        "viewers rotate this image; boxes and masks refer to the stored pixels",
        lambda header: header.orientation != 1,
        lambda header: f"EXIF orientation {header.orientation}",
    ),
    _HeaderIssue(
        "PIXELS_STRETCHED",
        Severity.WARNING,
        "values have more than 8 bits; the range of each file becomes 0 to 255",
        lambda header: header.pixel_format.is_stretched,
        lambda header: str(header.pixel_format),
    ),
    _HeaderIssue(
        "BANDS_DROPPED",
        Severity.WARNING,
        "only the first three bands are used",
        lambda header: header.pixel_format.dropped_bands > 0,
        lambda header: str(header.pixel_format),
    ),
    _HeaderIssue(
        "SEVERAL_FRAMES",
        Severity.WARNING,
        "only the first frame is used",
        lambda header: header.frames > 1,
        lambda header: f"{header.frames} frames",
    ),
)


_ROW_MEANINGS: Final[dict[str, str]] = {
    Reason.BAD_POINT: "points are not a list of [x, y, 1] or [x, y, 0]",
    Reason.BOX_ROTATED: "box is rotated, and its mask would be misplaced",
    Reason.IMAGE_UNKNOWN: "no image row has the image_id of the annotation",
}

_MASK_MEANINGS: Final[dict[str, str]] = {
    Reason.BAD_GROUND_TRUTH: "mask cannot be read: evaluation does not count it, labeling replaces it",
    Reason.EMPTY_GROUND_TRUTH: "mask has no pixel: evaluation does not count it, labeling replaces it",
}

_IMAGE_MEANINGS: Final = {
    "IMAGE_NOT_FOUND": "file is missing or cannot be read",
    "IMAGE_DECODE_FAILED": "file is damaged or truncated",
    "IMAGE_FORMAT": "file has no supported format, or bands or values that form no image",
    "IMAGE_TOO_LARGE": "image is larger than servers accept by default",
    "IMAGE_SIZE_MISMATCH": "size of the file differs from its row",
}


_MISFITS: Final = {
    BoxForm.CORNERS: ("BOX_EMPTY", Severity.ERROR, "box has no area as corners: a maximum is not above its minimum"),
    BoxForm.SHARES: (str(Reason.BAD_BOX), Severity.ERROR, "box has no shares of its image: numbers from 0 to 1"),
}
"""Code, severity and meaning of a box that does not have the form of the others."""


class _RowChecker:
    """Checks the annotations, one at a time."""

    def __init__(self, report: CheckReport, head: CocoHead, sizes: dict[JsonId, tuple[int, int] | None]) -> None:
        self._report = report
        self._boxes = CheckReport(report.file)
        """Issues of single boxes as x, y, width, height, which mean nothing if all boxes have another form."""
        self._misfits = {form: CheckReport(report.file) for form in BoxForm if form is not BoxForm.XYWH}
        """Errors of the boxes that do not have another form, by that form."""
        self._numbers = array("d")
        """x, y, w, h of each box, then width and height of its image."""
        self._crowds = 0
        self._head = head
        self._sizes = sizes
        self._seen: set[int] = set()
        self._with_boxes: set[JsonId] = set()
        for name in head.category_names.values():
            report.by_category[name] += 0

    def check(self, _: int, row: Annotation) -> None:
        """Checks one annotation."""
        if row.image_id is not None:
            self._with_boxes.add(row.image_id)
        self._check_category(row)
        if row.problem is not None:
            if row.reason is not Reason.IMAGE_UNUSABLE:
                meaning = _ROW_MEANINGS.get(str(row.reason), "annotation is invalid")
                self._report.add(str(row.reason), Severity.ERROR, meaning, row.problem)
            return
        if row.iscrowd:
            self._crowds += 1
            return
        if row.is_rotated:
            meaning = "box is rotated; the upright box around it is labeled"
            self._report.add(str(Reason.BOX_ROTATED), Severity.WARNING, meaning, f"annotation {row.id!r}")
        # 64 bits of hash: a million boxes that differ collide with a chance of 1 in 30 million.
        fingerprint = hash((row.image_id, row.category_id, row.box_xywh))
        if fingerprint in self._seen:
            text = f"annotation {row.id!r} on image {row.image_id!r}"
            self._report.add("DUPLICATE_BOX", Severity.WARNING, "same image, class and box as an earlier row", text)
        self._seen.add(fingerprint)
        self._check_box(row)

    def finish(self) -> None:
        """Adds the issues that need all annotations."""
        if self._crowds:
            self._add_crowds()
        numbers = np.frombuffer(self._numbers, dtype=np.float64).reshape(-1, 6)
        form, text = likely_form(numbers[:, :4], numbers[:, 4:])
        if form is BoxForm.XYWH:
            self._report.take(self._boxes)
        else:
            self._report.take(self._misfits[form])
            is_error = form is BoxForm.SHARES or self._boxes.count(Severity.ERROR) > 0
            severity = Severity.ERROR if is_error else Severity.WARNING
            self._report.add(f"BOXES_ARE_{form.name}", severity, "boxes are not x, y, width, height in px", text)
        for name, count in self._report.by_category.items():
            if not count:
                self._report.add("CATEGORY_UNUSED", Severity.NOTE, "category has no annotations", name)
        for image in self._head.images.values():
            if image.id not in self._with_boxes and image.problem is None:
                self._report.add("IMAGE_WITHOUT_BOXES", Severity.NOTE, "image has no annotations", image.file_name)

    def _check_category(self, row: Annotation) -> None:
        category_id = row.category_id
        if category_id is None:
            if row.raw:
                text = f"annotation {row.id!r}: category_id {as_json(row.raw.get('category_id'))}"
                self._report.add("NO_CATEGORY", Severity.NOTE, "annotation has no category; masks need none", text)
            return
        name = self._head.category_names.get(category_id)
        self._report.by_category[str(category_id) if name is None else name] += 1
        if name is None and self._head.category_names:
            text = f"annotation {row.id!r}: category_id {as_json(category_id)}"
            meaning = "category is not in the list of categories; it is labeled, and counted under its id"
            self._report.add("CATEGORY_UNKNOWN", Severity.WARNING, meaning, text)

    def _add_crowds(self) -> None:
        if self._crowds < self._report.annotations:
            text = f"{self._crowds} of {counted(self._report.annotations, 'annotation')}"
            self._report.add("CROWD", Severity.NOTE, "crowd regions are copied without labeling", text, self._crowds)
            return
        meaning = (
            "every annotation is a crowd region (iscrowd 1), so none is labeled; if each is one object, as in files of "
            "CVAT, give --crowd-as-objects"
        )
        self._report.add("CROWD", Severity.WARNING, meaning, f"all {self._crowds} annotations", self._crowds)

    def _check_mask(self, row: Annotation, size_wh: tuple[int, int], name: str) -> None:
        if not has_segmentation(row.raw):
            return
        try:
            read_ground_truth(row.raw, (size_wh[1], size_wh[0]), name)
        except BadGroundTruth as error:
            self._report.add(error.reason, Severity.WARNING, _MASK_MEANINGS[error.reason], str(error))
            return
        ignored = ignored_polygons(row.raw["segmentation"])
        if ignored:
            text = f"{name}: {ignored} of {len(row.raw['segmentation'])} polygons"
            self._report.add("POLYGON_IGNORED", Severity.NOTE, "polygon has fewer than three points", text)

    def _check_box(self, row: Annotation) -> None:
        image = None if row.image_id is None else self._head.images.get(row.image_id)
        size_wh = None if image is None else image.size_wh or self._sizes.get(image.id)
        self._numbers.extend((*row.box_xywh, *(size_wh or (math.nan, math.nan))))
        name, box_text = f"annotation {row.id!r}", "[" + ", ".join(f"{value:g}" for value in row.box_xywh) + "]"
        for form, report in self._misfits.items():
            if not has_form(row.box_xywh, form):
                report.add(*_MISFITS[form], f"{name}: {box_text}")
        if size_wh is None:
            # The file of this image was reported already.
            return
        self._check_mask(row, size_wh, name)
        try:
            inside, was_clipped = check_box(row.box_xywh, (size_wh[1], size_wh[0]), name)
        except BadBox as error:
            code, meaning = _box_error(row.box_xywh, size_wh)
            self._boxes.add(code, Severity.ERROR, meaning, str(error))
            return
        self._check_points(row, inside, (size_wh[1], size_wh[0]), name)
        if was_clipped:
            text = f"{name}: {box_text} on an image of {size_wh[0]}x{size_wh[1]} px"
            self._boxes.add("BOX_CLIPPED", Severity.WARNING, "box extends beyond its image and is clipped", text)
        _, _, w, h = inside
        if min(w, h) <= SMALL_SIDE_PX:
            text = f"{name}: {box_text}"
            self._boxes.add("BOX_SMALL", Severity.WARNING, f"a side is at most {SMALL_SIDE_PX:g} px", text)
        self._boxes.boxes_by_size[SIZE_NAMES[size_class(w * h)]] += 1
        self._boxes.box_sides[math.floor(math.log2(math.sqrt(w * h)))] += 1

    def _check_points(self, row: Annotation, box_inside: Box, image_hw: tuple[int, int], name: str) -> None:
        try:
            check_points(row.points, image_hw, box_pixels(box_inside, image_hw), name)
        except BadPoint as error:
            meaning = "no mask of the box can obey its points"
            self._report.add(str(Reason.BAD_POINT), Severity.ERROR, meaning, str(error))


def _box_error(box_xywh: Box, size_wh: tuple[int, int]) -> tuple[str, str]:
    """Returns (code, meaning) for a box that cannot be labeled: the first rule of `check_box` that it breaks."""
    if not all(map(math.isfinite, box_xywh)):
        return str(Reason.BAD_BOX), "box contains a value that is not a finite number"
    x, y, w, h = box_xywh
    if not (w > 0 and h > 0):
        return "BOX_EMPTY", "box has no area; width and height must be above 0"
    overlaps = x < size_wh[0] and y < size_wh[1] and x + w > 0 and y + h > 0
    if overlaps and w * h < 1.0:
        return str(Reason.BOX_TOO_SMALL), "box is smaller than 1 px²"
    return "BOX_OUTSIDE", "less than 1 px² of the box lies inside its image"

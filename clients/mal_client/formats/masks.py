"""Reads the masks of a labeled COCO file, image by image, for the writers of other formats in this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from mal_client.formats.boxes import RowError
from mal_client.images.image_files import ImageFiles
from mal_train.core.atomic_io import atomic_write, is_same_file
from mal_train.core.coco.annotations import Annotation, CocoFile, ImageInfo, Reason, by_image, read_coco, row_name
from mal_train.core.errors import BadDataset, BadImage, OutputError
from mal_train.core.images.header import read_header
from mal_train.core.input_files import resolve_inside
from mal_train.core.masks.encodings import to_polygons
from mal_train.core.masks.polygons import Rings
from mal_train.core.masks.rle import Rle, from_segmentation
from mal_train.core.settings import LABELED
from mal_train.core.storage.addresses import Location, is_remote, redact

MAX_NAME_BYTES = 255
"""Longest name of a file or folder in the usual file systems."""


@dataclass(frozen=True)
class MaskRow:
    """One labeled object.

    Attributes:
        row: the annotation as in the file.
        category: name of its class.
        category_index: index of its class in the file's list, from 0.
        rle: the mask; not empty.
        rings: outlines of the mask.
    """

    row: dict[str, Any]
    category: str
    category_index: int
    rle: Rle
    rings: Rings


@dataclass
class ExportSummary:
    """Counts and errors of an export.

    Attributes:
        written: objects written.
        crowds: crowd regions omitted; none of the formats supports them.
        errors: errors of all other omitted objects.
    """

    written: int = 0
    crowds: int = 0
    errors: list[RowError] = field(default_factory=list)


class MaskFile:
    """A labeled COCO file.

    Args:
        path: the file.
        files: its images; read where their rows state no size.
        tolerance_px: largest distance between an outline and the edge of its mask; 0 = exact.

    Raises:
        BadDataset: the file cannot be used.
    """

    def __init__(self, path: Location, files: ImageFiles, tolerance_px: float = 0.0) -> None:
        self.path = path
        self._files = files
        self._coco: CocoFile = read_coco(path, LABELED)
        self._tolerance_px = tolerance_px
        names = self._coco.used_category_names
        self.names = list(names.values())
        self._category_indices = {category_id: index for index, category_id in enumerate(names)}
        self.summary = ExportSummary()
        for row in self._coco.annotations:
            if row.image_id is None or row.image_id not in self._coco.images:
                self._omit(row, row.problem or "no image")

    def images(self) -> Iterator[tuple[ImageInfo, list[MaskRow]]]:
        """Yields every usable image, with its size and its objects; counts omissions in `summary`."""
        for image, rows in by_image(self._coco):
            if image.problem is not None:
                self.summary.errors.append(RowError(image.file_name, str(Reason.IMAGE_UNUSABLE), image.problem))
                continue
            try:
                width, height = image.size_wh or self._stored_size(image.file_name)
            except BadImage as error:
                self.summary.errors.append(RowError(image.file_name, error.reason, str(error)))
                continue
            mask_rows = [row for row in (self._mask_row(row, (width, height)) for row in rows) if row is not None]
            self.summary.written += len(mask_rows)
            yield replace(image, width=width, height=height), mask_rows

    def _stored_size(self, file_name: str) -> tuple[int, int]:
        return read_header(self._files.read(file_name), redact(self._files.locate(file_name))).size_wh

    def _mask_row(self, row: Annotation, size_wh: tuple[int, int]) -> MaskRow | None:
        if row.iscrowd:
            self.summary.crowds += 1
            return None
        failure = row.raw.get("error")
        if row.problem is not None or failure:
            self._omit(row, row.problem or f"{row_name(row.id)}: not labeled ({_failure_text(failure, row)})")
            return None
        try:
            rle = from_segmentation(row.raw.get("segmentation"), size_wh[1], size_wh[0], f"annotation {row.id!r}")
        except BadDataset as error:
            self._omit(row, str(error))
            return None
        rings = to_polygons(rle, self._tolerance_px).rings
        if not rings:
            self._omit(row, f"annotation {row.id!r}: mask is empty")
            return None
        index = self._category_indices[row.category_id]
        return MaskRow(dict(row.raw), self.names[index], index, rle, rings)

    def _omit(self, row: Annotation, text: str) -> None:
        self.summary.errors.append(RowError(f"annotation {row.id!r}", str(row.reason or "NO_MASK"), text))


def _failure_text(failure: object, row: Annotation) -> str:
    """Returns reason and message of the `error` of a labeled row, without the name of the row."""
    if not isinstance(failure, Mapping):
        return str(failure)
    texts = [str(failure[key]) for key in ("reason", "message") if failure.get(key)]
    return ": ".join(text.removeprefix(f"{row_name(row.id)}: ") for text in texts) or "no reason stated"


class LabelFiles:
    """Paths of the label files: below one folder, named like the images. An image without a path is an error.

    Args:
        folder: parent of all label files. No file name leads out of it, since a COCO file may come from anywhere.
        suffix: suffix of the label files, with its dot.
        masks: the labeled file, which no label file replaces; its summary receives the errors.
    """

    def __init__(self, folder: Path, suffix: str, masks: MaskFile) -> None:
        self._folder = folder
        self._suffix = suffix
        self._source = masks.path
        self._summary = masks.summary
        self._taken: dict[PurePosixPath, str] = {}

    def path(self, image: ImageInfo, rows: Sequence[MaskRow]) -> Path | None:
        """Returns the label file of an image; None if it cannot be written, after counting `rows` as omitted."""
        name = PurePosixPath(image.file_name)
        if name.is_absolute() or ".." in name.parts or not name.name:
            self.omit(image, rows, "NAME_OUTSIDE", f"label file would be outside {self._folder}")
            return None
        relative = name.with_suffix(self._suffix)
        if max(len(os.fsencode(part)) for part in relative.parts) > MAX_NAME_BYTES:
            text = f"the name of its label file, or of a folder, has more than {MAX_NAME_BYTES} bytes; rename the image"
            self.omit(image, rows, "NAME_TOO_LONG", text)
            return None
        if resolve_inside(self._folder, str(relative.parent)) is None:
            self.omit(image, rows, "NAME_OUTSIDE", f"a link leads out of {self._folder}; remove it")
            return None
        if not is_remote(self._source) and is_same_file(Path(self._source), self._folder / relative):
            text = f"label file would replace {self._source}; choose another --output"
            self.omit(image, rows, "NAME_TAKEN", text)
            return None
        if relative in self._taken:
            text = f"label file would have the same name as that of {self._taken[relative]}; rename one of the images"
            self.omit(image, rows, "NAME_TAKEN", text)
            return None
        self._taken[relative] = image.file_name
        return self._folder / relative

    def omit(self, image: ImageInfo, rows: Sequence[MaskRow], reason: str, text: str) -> None:
        """Counts the rows of an image without a label file as omitted."""
        self._summary.written -= len(rows)
        self._summary.errors.append(
            RowError(image.file_name, reason, f"{image.file_name}: {text.removeprefix(f'{image.file_name}: ')}")
        )


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically and creates its parent folders. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    with atomic_write(path) as file:
        file.write(content)

"""Converts boxes of other formats to a COCO file: reads image sizes, validates boxes and lists errors.

The readers in this folder only parse; this module decides which boxes are valid and reports the others.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mal_client.images.image_files import IMAGE_SUFFIXES, ImageFiles
from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.stream import write_coco
from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.images.header import read_header
from mal_train.core.input_files import read_limited
from mal_train.core.storage.addresses import Location, redact
from mal_train.core.storage.read_ahead import ReadAhead

BAD_ROW = "BAD_ROW"

MAX_LABEL_BYTES = 64 * 1024 * 1024
"""Size limit of a file with the annotations of one image."""


@dataclass(frozen=True)
class RowError:
    """An item that was not converted. `where` is a file, followed by a colon and a line if it has one."""

    where: str
    reason: str
    message: str

    def to_dict(self) -> dict[str, str]:
        """Returns one line of the errors file."""
        return {"where": self.where, "reason": self.reason, "message": self.message}


@dataclass(frozen=True)
class BoxRecord:
    """One box as a reader parsed it.

    Attributes:
        where: file and line, for messages and for the field `source` of the COCO row.
        file_name: its image, relative to the image folder.
        category: name of its class.
        xyxy: left, top, right, bottom; in px, or as fractions of width and height.
        is_normalized: the numbers are fractions in [0, 1].
        stated_wh: width and height of the image as the annotation states them; None if it does not.
        polygon: x0, y0, x1, y1, … of an outline, in the unit of xyxy; empty if there is none.
        extra: additional fields of the COCO row.
    """

    where: str
    file_name: str
    category: str
    xyxy: tuple[float, float, float, float]
    is_normalized: bool = False
    stated_wh: tuple[int, int] | None = None
    polygon: tuple[float, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConversionResult:
    """A COCO file in memory, and the errors of the items that it lacks."""

    coco: dict[str, Any]
    errors: list[RowError]

    @property
    def boxes(self) -> int:
        """Number of converted boxes."""
        return len(self.coco["annotations"])


def to_coco(
    rows: Iterable[BoxRecord | RowError],
    images: ImageFiles | Location,
    categories: Iterable[str] = (),
    file_names: Iterable[str] = (),
) -> ConversionResult:
    """Builds a COCO file. Each row becomes an annotation or an error.

    Args:
        rows: boxes, and the errors of their reader.
        images: folder or address of the images; sizes are read from their headers, remote ones several at a time.
        categories: category names in the order of their IDs, from 1; other categories follow alphabetically.
        file_names: images to include even if they have no box.
    """
    files = ImageFiles.of(images)
    builder = _CocoBuilder(files)
    converted: list[tuple[BoxRecord, dict[str, Any]]] = []
    errors: list[RowError] = []
    names = list(file_names)
    if files.is_remote:  # read ahead; a local file is read when its row comes
        rows = list(rows)
        builder.read_sizes([*names, *(row.file_name for row in rows if isinstance(row, BoxRecord))])
    for name in names:
        error = builder.add_image(name, f"{files.name}/{name}")
        if error is not None:
            errors.append(error)
    for row in rows:
        annotation = row if isinstance(row, RowError) else builder.annotation(row)
        if isinstance(annotation, RowError):
            errors.append(annotation)
        elif isinstance(row, BoxRecord):
            converted.append((row, annotation))
    known = list(dict.fromkeys(categories))
    known += sorted({row.category for row, _ in converted} - set(known))
    ids = {name: category_id for category_id, name in enumerate(known, start=1)}
    annotations = [
        {"id": annotation_id, **annotation, "category_id": ids[row.category]}
        for annotation_id, (row, annotation) in enumerate(converted, start=1)
    ]
    coco = {
        "images": list(builder.images.values()),
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for name, category_id in ids.items()],
    }
    return ConversionResult(coco, errors)


def errors_path(output_json: Path) -> Path:
    """Returns the list of errors of a conversion: `out.errors.jsonl` beside `out.json`."""
    return output_json.with_name(f"{output_json.stem}.errors.jsonl")


def write_result(result: ConversionResult, output_json: Path) -> Path | None:
    """Writes the COCO file, and its errors beside it; returns the path of the errors file, None without errors."""
    errors_file = errors_path(output_json)
    write_coco(output_json, result.coco)
    if not result.errors:
        errors_file.unlink(missing_ok=True)
        return None
    with atomic_write(errors_file) as file:
        file.writelines(json.dumps(error.to_dict()).encode() + b"\n" for error in result.errors)
    return errors_file


def image_names(files: ImageFiles) -> list[str]:
    """Returns the sorted names of the image files below a folder or prefix.

    Raises:
        BadDataset: there are none.
        StorageError, StoreUnreachable: the store cannot be listed; web servers have no list.
    """
    names = sorted(files.names())
    if not names:
        raise BadDataset(f"{files.name}: contains no image file ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return names


def parse_numbers(texts: Iterable[str], names: Iterable[str], where: str) -> tuple[float, ...] | RowError:
    """Parses finite numbers; returns an error that names the first text that is not one."""
    values = []
    for text, name in zip(texts, names, strict=True):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            return RowError(where, BAD_ROW, f"{where}: {name} {text!r}; expected a finite number")
        values.append(value)
    return tuple(values)


def annotation_files(folder: Path, suffix: str) -> Iterator[Path]:
    """Yields the files with a suffix below a folder, sorted. Raises BadDataset if there are none."""
    paths = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file()) if folder.is_dir() else []
    if not paths:
        raise BadDataset(f"{folder}: contains no {suffix} file; give the folder of the annotations with --labels")
    yield from paths


def read_label_file(path: Path) -> bytes:
    """Returns the bytes of the annotations of one image. Raises OSError, also for more than MAX_LABEL_BYTES."""
    content = read_limited(path, MAX_LABEL_BYTES)
    if len(content) > MAX_LABEL_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_LABEL_BYTES} bytes", str(path))
    return content


def match_error(labels_file: str, image_name: str, matches: Sequence[str]) -> RowError:
    """Returns the error of an annotation file whose image is missing or ambiguous."""
    problem = f"matches several images: {', '.join(matches)}" if matches else "no such image"
    return RowError(labels_file, "BAD_IMAGE", f"{labels_file}: image {image_name!r}: {problem}")


class _CocoBuilder:
    """Builds rows of a COCO file; reads the header of each image once."""

    def __init__(self, files: ImageFiles) -> None:
        self.images: dict[str, dict[str, Any]] = {}
        self._files = files
        self._sizes_wh: dict[str, tuple[int, int] | BadImage] = {}

    def read_sizes(self, names: Iterable[str]) -> None:
        """Reads the size of each image ahead of `add_image`, several at a time."""
        with ReadAhead(dict.fromkeys(names), self._read_size, lambda _: 0, str) as ahead:
            for name in ahead:
                self._sizes_wh[name] = ahead.take(name)

    def _read_size(self, name: str) -> tuple[int, int] | BadImage:
        try:
            return read_header(self._files.read(name), redact(self._files.locate(name))).size_wh
        except BadImage as error:
            return error

    def add_image(self, name: str, where: str) -> RowError | None:
        if name in self.images:
            return None
        if name not in self._sizes_wh:
            self._sizes_wh[name] = self._read_size(name)
        size_wh = self._sizes_wh[name]
        if isinstance(size_wh, BadImage):
            return RowError(where, "BAD_IMAGE", f"{where}: {size_wh}")
        width, height = size_wh
        self.images[name] = {"id": len(self.images) + 1, "file_name": name, "width": width, "height": height}
        return None

    def annotation(self, row: BoxRecord) -> dict[str, Any] | RowError:
        error = self.add_image(row.file_name, row.where)
        if error is not None:
            return error
        image = self.images[row.file_name]
        size_wh = (image["width"], image["height"])
        if row.stated_wh is not None and row.stated_wh != size_wh:
            stated = f"annotation states {row.stated_wh[0]}x{row.stated_wh[1]} px, file is {size_wh[0]}x{size_wh[1]} px"
            rotated = "; it may be rotated by EXIF" if row.stated_wh == size_wh[::-1] else ""
            return RowError(row.where, "IMAGE_SIZE_MISMATCH", f"{row.where}: {row.file_name}: {stated}{rotated}")
        if row.is_normalized and not all(-0.001 <= value <= 1.001 for value in (*row.xyxy, *row.polygon)):
            text = f"{list(row.xyxy)}; expected fractions of width and height in [0, 1], not pixels"
            return RowError(row.where, BAD_ROW, f"{row.where}: {text}")
        scale_xy = size_wh if row.is_normalized else (1, 1)
        x0, y0, x1, y1 = (value * scale_xy[index % 2] for index, value in enumerate(row.xyxy))
        if x1 <= x0 or y1 <= y0:
            return RowError(
                row.where, BAD_ROW, f"{row.where}: box from {x0:g}, {y0:g} to {x1:g}, {y1:g} px has no area"
            )
        box = [x0, y0, x1 - x0, y1 - y0]
        if not math.isfinite(box[2] * box[3]):
            return RowError(row.where, BAD_ROW, f"{row.where}: box {box}; its numbers are too large for an area")
        annotation: dict[str, Any] = {"image_id": image["id"], "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        if row.polygon:
            annotation["segmentation"] = [[value * scale_xy[index % 2] for index, value in enumerate(row.polygon)]]
        return {**annotation, **row.extra, "source": row.where}

"""Reads boxes from YOLO text files: a file per image, a row per object, all numbers shares of width and height."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from mal_client.formats.boxes import BAD_ROW, BoxRecord, Row, RowError, check_shares, parse_numbers
from mal_client.formats.class_names import NAMES_FILES, ClassNames
from mal_client.formats.label_files import (
    ImageNames,
    ImageRows,
    annotation_files,
    file_rows,
    only_image,
    read_label_lines,
    without_rivals,
    without_suffix,
)
from mal_client.formats.rotated import extent
from mal_client.formats.row_forms import YoloRows
from mal_client.images.image_files import is_image_name
from mal_train.core.errors import ConfigError

BOX: Final = 4
CORNERS: Final = 8
TRIANGLE: Final = 6

LABELS: Final = "labels/"
"""Folder of the text files directly in the given one; the folder of the images may be the one beside it."""

_OTHER_DELIMITER: Final = re.compile("[,;|]")

MAX_DIGITS: Final = 18
"""Digits of a class; Python refuses to parse thousands."""


def read_yolo(
    labels_dir: Path,
    images: ImageNames,
    classes: ClassNames,
    rows: YoloRows = YoloRows.AUTO,
    encoding: str | None = None,
) -> Iterator[Row]:
    """Yields the boxes of all text files below a folder, file by file.

    A row is `class cx cy w h`, optionally followed by a confidence (stored as `score`), `class x0 y0 x1 y1 …`, an
    outline (stored as `segmentation`) whose extent is the box, or a box followed by key points (stored as `keypoints`).
    An image without a text file has no boxes; a text file without an image is an error, except lists of images,
    files of class names and README files.

    Args:
        labels_dir: folder of the text files, with the names and subfolders of the images; a folder `labels` stands for
            `images`.
        images: the images.
        classes: class names by number.
        rows: kind of the rows.
        encoding: of text without a byte order mark; None is UTF-8.

    Raises:
        ConfigError: rows of poses, and the class names have no `kpt_shape`.
    """
    if rows is YoloRows.AUTO and classes.keypoints is not None:
        rows = YoloRows.POSE
    if rows is YoloRows.POSE and classes.keypoints is None:
        raise ConfigError(f"--rows pose: {classes.path} has no kpt_shape; give a data.yaml that has it")
    yield from without_rivals(_read_files(labels_dir, images, _RowReader(classes, rows), encoding))


def _read_files(
    labels_dir: Path, images: ImageNames, reader: _RowReader, encoding: str | None
) -> Iterator[ImageRows | RowError]:
    for path, name in annotation_files(labels_dir, ".txt"):
        stem = without_suffix(name)
        found = images.at(stem) or images.at(_in_images(stem)) or images.at(stem.removeprefix(LABELS))
        lines = read_label_lines(path, name, encoding)
        if not found and not isinstance(lines, RowError) and _is_no_label_file(name, lines):
            continue
        image = only_image(name, stem, found)
        if isinstance(image, RowError):
            yield image
        elif isinstance(lines, RowError):
            yield replace(lines, images=(image,))
        else:
            numbered = ((number, line.split()) for number, line in enumerate(lines, start=1) if line.strip())
            yield file_rows(name, image, [reader.read(cells, f"{name}:{number}", image) for number, cells in numbered])


class _RowReader:
    """Reads the rows of one kind."""

    def __init__(self, classes: ClassNames, rows: YoloRows) -> None:
        self._classes = classes
        self._rows = rows

    def read(self, cells: list[str], where: str, file_name: str) -> BoxRecord | RowError:
        names = self._classes.names
        number = cells[0].removesuffix(".0")
        if not (number.isascii() and number.isdecimal() and len(number) <= MAX_DIGITS and int(number) < len(names)):
            rule = f"expected 0 to {len(names) - 1}, the classes of {self._classes.path}"
            if _OTHER_DELIMITER.search(number):
                rule = f"expected only spaces between the numbers; {rule}"
            return RowError(where, BAD_ROW, f"{where}: class {cells[0][:100]!r}; {rule}")
        values = parse_numbers(cells[1:], (f"number {index}" for index in range(1, len(cells))), where)
        if isinstance(values, RowError):
            return values
        count, rest = self._expected(len(values), cells[-1])
        if count is None or len(values) - count not in (0, 1):
            text = f"{len(values)} numbers after the class; expected {rest}"
            return RowError(where, BAD_ROW, f"{where}: {text}")
        extra: dict[str, Any] = {}
        if len(values) > count:
            extra["score"] = values[-1]
            if not 0 <= values[-1] <= 1:
                return RowError(where, BAD_ROW, f"{where}: confidence {values[-1]:g}; expected 0 to 1")
        return self._record(values[:count], where, file_name, names[int(number)], extra)

    def _expected(self, count: int, last: str) -> tuple[int | None, str]:
        """Returns how many numbers a row has without a confidence, None for a row of no known form, and these forms."""
        rows = self._rows
        if rows is YoloRows.POSE and self._classes.keypoints is not None:
            points, each = self._classes.keypoints
            return BOX + points * each, f"a box and {points} key points of {each}, by kpt_shape"
        if rows is YoloRows.OBB:
            return CORNERS, "x0 y0 … x3 y3, the corners of a box"
        if rows is YoloRows.BOXES or (rows is YoloRows.AUTO and count <= BOX + 1):
            return BOX, "cx cy w h, or that and a confidence; --rows names other forms"
        if rows is YoloRows.SEGMENTS:
            return (count - count % 2 if count >= TRIANGLE else None), "x0 y0 x1 y1 x2 y2 …"
        forms = "cx cy w h, a confidence, or x0 y0 x1 y1 x2 y2 …; --rows and kpt_shape name other forms"
        if count == TRIANGLE and last.isdecimal():
            return (
                None,
                "no whole last number, which may be a track's; for outlines, give --rows segments",
            )
        is_outline = not count % 2
        return count if is_outline else None, forms

    def _record(
        self, values: tuple[float, ...], where: str, file_name: str, category: str, extra: dict[str, Any]
    ) -> BoxRecord | RowError:
        is_box = len(values) == BOX or self._rows is YoloRows.POSE
        error = check_shares(values[:BOX] if is_box else values, where)
        if error is not None:
            return error
        if not is_box:
            corners = values if len(values) == CORNERS and self._rows is not YoloRows.SEGMENTS else ()
            polygon = () if self._rows is YoloRows.OBB else values
            return BoxRecord(
                *(where, file_name, category, extent(values)),
                is_normalized=True,
                polygon=polygon,
                corners=corners,
                extra=extra,
            )
        cx, cy, w, h = values[:BOX]
        xyxy = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        points = self._keypoints(values[BOX:])
        return BoxRecord(where, file_name, category, xyxy, is_normalized=True, keypoints=points, extra=extra)

    def _keypoints(self, values: tuple[float, ...]) -> tuple[float, ...]:
        """Returns x, y, visibility of each key point; without visibilities, a point at 0, 0 is not labeled."""
        if not values or self._classes.keypoints is None:
            return ()
        if self._classes.keypoints[1] == 3:
            return values
        points = zip(values[0::2], values[1::2], strict=True)
        return tuple(value for x, y in points for value in (x, y, 2.0 if x or y else 0.0))


def _in_images(stem: str) -> str:
    """Returns the path of an image for that of a text file: its last folder `labels` becomes `images`."""
    parts = list(PurePosixPath(stem).parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "labels":
            parts[index] = "images"
            break
    return "/".join(parts)


def _is_no_label_file(name: str, lines: list[str]) -> bool:
    """Returns True for a file of class names, a README, or a list of images."""
    base = PurePosixPath(name).name.lower()
    if base in NAMES_FILES or base.startswith("readme."):
        return True
    paths = [line.strip() for line in lines if line.strip()]
    return bool(paths) and all(map(is_image_name, paths))

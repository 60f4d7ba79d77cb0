"""Reads boxes from a CSV file with one row per box; recognizes the usual column names."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from mal_client.formats.boxes import BAD_ROW, BoxRecord, RowError, parse_numbers
from mal_train.core.errors import BadDataset

FILE: Final = ("file_name", "filename", "file", "image", "image_name", "image_path", "path")
CATEGORY: Final = ("category", "class", "class_name", "label", "name", "category_name")
CORNERS: Final = (("x_min", "xmin", "x1", "left"), ("y_min", "ymin", "y1", "top"), ("x_max", "xmax", "x2", "right"),
                  ("y_max", "ymax", "y2", "bottom"))  # fmt: skip
SIZES: Final = (("x", "bbox_x", "left", "x_min", "xmin"), ("y", "bbox_y", "top", "y_min", "ymin"),
                ("width", "w", "bbox_width", "bbox_w"), ("height", "h", "bbox_height", "bbox_h"))  # fmt: skip

DEFAULT_CATEGORY: Final = "object"


def read_csv(path: Path, columns: Sequence[str] = ()) -> Iterator[BoxRecord | RowError]:
    """Yields boxes in px, in the order of the file.

    The file needs a column of file names and the columns of either corners (left, top, right, bottom) or x, y, width
    and height, under one of the names above, in any case. Without a category column, every box is an "object". The
    delimiter is a comma, semicolon or tab.

    Args:
        path: the file, UTF-8.
        columns: names of the columns, for a file without a header.

    Raises:
        BadDataset: the file cannot be read, or a column is missing or repeated.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadDataset(f"{path}: cannot be read ({error}); expected a CSV file in UTF-8") from None
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [name.strip().lower() for name in (columns or next(table, []))]
        columns_of = _Columns(path, header)
        for row in table:
            where = f"{path.name}:{table.line_num}"
            if any(cell.strip() for cell in row):
                yield columns_of.read(row, where)
    except csv.Error as error:
        raise BadDataset(f"{path}: line {table.line_num}: {error}; check for a missing quotation mark") from None


class _Columns:
    """Maps the columns of a table to the fields of a box."""

    def __init__(self, path: Path, header: list[str]) -> None:
        if len(set(header)) != len(header):
            raise BadDataset(f"{path}: column names are not unique: {', '.join(header)}")
        self._width = len(header)
        self._file = _index_of(header, FILE)
        self._category = _index_of(header, CATEGORY)
        corners = [_index_of(header, names) for names in CORNERS]
        sizes = [_index_of(header, names) for names in SIZES]
        # Corners win: such tables often also have the width and height of the image.
        self._is_corners = None not in corners
        box = corners if self._is_corners else sizes
        if self._file is None or None in box:
            raise BadDataset(
                f"{path}: columns {', '.join(header) or '(none)'}; expected file_name and x_min, y_min, x_max, "
                "y_max or x, y, width, height; for a file without a header, give --columns"
            )
        self._box = [index for index in box if index is not None]
        self._names = [header[index] for index in self._box]

    def read(self, row: list[str], where: str) -> BoxRecord | RowError:
        if len(row) != self._width:
            return RowError(where, BAD_ROW, f"{where}: {len(row)} columns; expected {self._width}")
        values = parse_numbers((row[index] for index in self._box), self._names, where)
        if isinstance(values, RowError):
            return values
        file_name = row[self._file or 0].strip()
        if not file_name:
            return RowError(where, BAD_ROW, f"{where}: file name is empty")
        a, b, c, d = values
        xyxy = (a, b, c, d) if self._is_corners else (a, b, a + c, b + d)
        category = DEFAULT_CATEGORY if self._category is None else row[self._category].strip() or DEFAULT_CATEGORY
        return BoxRecord(where, file_name, category, xyxy)


def _index_of(header: list[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)

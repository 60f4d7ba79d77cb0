"""Reads boxes from a CSV file with one row per box; recognizes the usual column names."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, TextIO

from mal_client.formats.boxes import BAD_ROW, BoxRecord, RowError, parse_numbers
from mal_train.core.errors import BadDataset

FILE: Final = ("file_name", "filename", "file", "image", "image_name", "image_path", "path")
CATEGORY: Final = ("category", "class", "class_name", "label", "name", "category_name")
CORNERS: Final = (("x_min", "xmin", "x1", "left"), ("y_min", "ymin", "y1", "top"), ("x_max", "xmax", "x2", "right"),
                  ("y_max", "ymax", "y2", "bottom"))  # fmt: skip
SIZES: Final = (("x", "bbox_x", "left", "x_min", "xmin"), ("y", "bbox_y", "top", "y_min", "ymin"),
                ("width", "w", "bbox_width", "bbox_w"), ("height", "h", "bbox_height", "bbox_h"))  # fmt: skip

MAX_ROW_CHARS: Final = 1024 * 1024
"""Longest row of a file; one of boxes has some hundred characters."""

DEFAULT_CATEGORY: Final = "object"


def read_csv(path: Path, columns: Sequence[str] = ()) -> Iterator[BoxRecord | RowError]:
    """Yields boxes in px, in the order of the file.

    The file needs a column of file names and the columns of either corners (left, top, right, bottom) or x, y, width
    and height, under one of the names above, in any case. Without a category column, every box is an "object". The
    delimiter is a comma, semicolon or tab.

    Args:
        path: the file, UTF-8.
        columns: names of the columns, for a file without a header.

    Memory does not grow with the file: no more than a row of it is held.

    Raises:
        BadDataset: the file cannot be read, a column is missing or repeated, or a row has more than MAX_ROW_CHARS.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _read_rows(path, file, columns)
    except (OSError, UnicodeDecodeError) as error:
        raise BadDataset(f"{path}: cannot be read ({error}); expected a CSV file in UTF-8") from None


def _read_rows(path: Path, file: TextIO, columns: Sequence[str]) -> Iterator[BoxRecord | RowError]:
    lines = _Lines(path, file)
    delimiter = max(",;\t", key=lines.first.count)
    table = csv.reader(lines, delimiter=delimiter)
    try:
        header = [name.strip().lower() for name in (columns or next(table, []))]
        columns_of = _Columns(path, header)
        for row in table:
            where = f"{path.name}:{table.line_num}"
            if any(cell.strip() for cell in row):
                yield columns_of.read(row, where)
            lines.row_chars = 0
    except csv.Error as error:
        raise BadDataset(f"{path}: line {table.line_num}: {error}; check for a missing quotation mark") from None


class _Lines:
    """Lines of a file for the parser of a table, one at a time.

    Attributes:
        first: the first line.
        row_chars: characters of the lines since the last complete row; the reader of the rows sets it to 0.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self.row_chars = 0
        self._path = path
        self._file = file
        self.first = self._next()
        self._is_new = True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.first if self._is_new else self._next()
        self._is_new = False
        if not line:
            raise StopIteration
        return line

    def _next(self) -> str:
        line = self._file.readline(MAX_ROW_CHARS + 1)
        self.row_chars += len(line)
        if self.row_chars > MAX_ROW_CHARS:
            raise BadDataset(
                f"{self._path}: a row of more than {MAX_ROW_CHARS} characters; check for a missing quotation mark"
            )
        return line


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
